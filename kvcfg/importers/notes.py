"""What an importer writes down while it goes through an engine's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcfg.composition.spelling import quoted
from kvcfg.importers.imported import LeftOut, ReadAs


class Notes:
    """An import in the making: settings are taken one by one, and what nobody took is left out.

    Args:
        settings: values by the engine's name for them.

    Attributes:
        overrides: what the config will be composed from.
        tokens: tokens of a replica that the cache is to hold, where the engine counts in those.
        share: the share of memory that it may take besides.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self.overrides: list[str] = []
        self.tokens: int | None = None
        self.share: float | None = None
        self._read_as: list[ReadAs] = []
        self._left_out: list[LeftOut] = []

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of a setting under the first of its names that is there; it is dealt with then."""
        found = [self._settings.pop(name) for name in names if name in self._settings]
        return found[0] if found else default

    def set(self, key: str, value: Any) -> None:
        """An override."""
        self.overrides.append(f"{key}={quoted(value)}")

    def read_as(self, setting: str, value: Any, key: str, becomes: Any, how: str) -> None:
        """An override that is not what the engine said, word for word."""
        self.set(key, becomes)
        self._read_as.append(ReadAs(setting, value, self.overrides[-1], how))

    def note(self, setting: str, value: Any, override: str, how: str) -> None:
        """A remark on a setting whose override is written elsewhere."""
        self._read_as.append(ReadAs(setting, value, override, how))

    def leave(self, setting: str, value: Any, why: str) -> None:
        """A setting that is not taken."""
        self._left_out.append(LeftOut(setting, value, why))

    def finish(self) -> tuple[tuple[ReadAs, ...], tuple[LeftOut, ...]]:
        """What was read differently, and what was left out: all that nobody took, too."""
        for setting, value in self._settings.items():
            self.leave(setting, value, "kvcfg has no key for it")
        return tuple(self._read_as), tuple(self._left_out)
