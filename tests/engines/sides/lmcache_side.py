"""In LMCache's environment: what its own loader makes of a file, as JSON; a warning of an unknown key is an error."""

from __future__ import annotations

import json
import logging
import sys

import yaml
from lmcache.v1.config import LMCacheEngineConfig

warned: list[str] = []


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warned.append(record.getMessage())


listener = Listener(logging.WARNING)
for name in list(logging.root.manager.loggerDict):
    logging.getLogger(name).addHandler(listener)
config = LMCacheEngineConfig.from_file(sys.argv[1])
with open(sys.argv[1], encoding="utf-8") as file:
    names = yaml.safe_load(file)
assert not warned, warned
print(json.dumps({name: getattr(config, name) for name in names}, default=str))
