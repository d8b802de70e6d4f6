"""A table of named things that are imported only when they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from kvcfg.errors import ConfigError, Problem, nearest, one_of


class Registry(Mapping[str, str]):
    """Names to "module:attribute"; a name costs nothing until `load` is called on it.

    Args:
        key: the configuration key whose values these names are, for error messages.
        entries: name to "package.module:attribute".
    """

    def __init__(self, key: str, entries: Mapping[str, str]) -> None:
        self._key = key
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        self.check(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check(self, name: str) -> None:
        """Raise ConfigError, naming what there is, if `name` is not in the table."""
        if name not in self._entries:
            close = nearest(name, list(self._entries))
            fix = None if close is None else f"{self._key}={close}"
            raise ConfigError(Problem(self._key, one_of(list(self._entries)), name, fix))

    def load(self, name: str) -> Any:
        """Import and return the object behind a name."""
        return load_object(self[name])


def load_object(path: str) -> Any:
    """Import and return what "package.module:attribute" names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
