"""In SGLang's environment: what its own parser makes of a file, as JSON."""

from __future__ import annotations

import argparse
import json
import sys

from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
words = ConfigArgumentMerger(parser).merge_config_with_args(["--config", sys.argv[1]])
print(json.dumps(vars(parser.parse_args(words)), default=str))
