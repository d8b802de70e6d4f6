"""What an export is: an engine's settings, and everything that they do not say or that the engine will not keep."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvcfg.errors import show
from kvcfg.exporters.documents import command_flags, document
from kvcfg.exporters.report import export_text


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that was asked for and that the engine cannot be told.

    Attributes:
        key: the override that asked for it.
        asked: the value.
        becomes: what the engine does instead.
        why: what the engine lacks.
    """

    key: str
    asked: Any
    becomes: str
    why: str

    def __str__(self) -> str:
        return f"{self.key}={show(self.asked)} → {self.becomes}: {self.why}"


@dataclass(frozen=True, slots=True)
class SilentChange:
    """A setting that the engine takes and then replaces.

    Attributes:
        setting: the setting, as the engine calls it.
        written: the value that the export writes.
        becomes: the value that it will run with.
        rule: when that happens.
        source: where the engine does it.
    """

    setting: str
    written: Any
    becomes: Any
    rule: str
    source: str

    def __str__(self) -> str:
        return f"{self.setting}={show(self.written)} → {show(self.becomes)}: {self.rule} [{self.source}]"


@dataclass(frozen=True, slots=True)
class Conversion:
    """A number that the engine counts in something else.

    Attributes:
        key: the override it comes from.
        asked: the value there.
        setting: the setting, as the engine calls it.
        value: the value there.
        how: the arithmetic.
    """

    key: str
    asked: Any
    setting: str
    value: Any
    how: str

    def __str__(self) -> str:
        return f"{self.key}={show(self.asked)} → {self.setting}={show(self.value)}: {self.how}"


@dataclass(frozen=True, slots=True)
class Export:
    """One config as one engine takes it.

    Attributes:
        engine: name of the engine.
        version: the version whose rules were followed.
        file_name: what the file is called unless told otherwise.
        settings: what the file says.
        launch: the command that starts the engine, without the file.
        file_flag: the flag that takes the file; an empty one where the file is read another way.
        losses: what the engine cannot be told.
        changes: what the engine will replace.
        conversions: numbers that were converted.
        needs: what else it takes to run.
    """

    engine: str
    version: str
    file_name: str
    settings: Mapping[str, Any]
    launch: tuple[str, ...]
    file_flag: str
    losses: tuple[Loss, ...]
    changes: tuple[SilentChange, ...]
    conversions: tuple[Conversion, ...]
    needs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The file, whole."""
        return document(self.settings, self.file_name)

    def command(self, path: str | None = None) -> tuple[str, ...]:
        """The command that starts the engine with the file, as words.

        Args:
            path: where the file is; None for its own name in the current folder.
        """
        if not self.file_flag:
            return self.launch
        return (*self.launch, self.file_flag, path or self.file_name)

    @property
    def flags(self) -> tuple[str, ...] | None:
        """The same as a command line without a file; None for engines that only read files."""
        return command_flags(self.engine, self.launch, self.settings)

    def to_dict(self) -> dict[str, Any]:
        """The export as plain values that JSON can hold."""
        return {
            "engine": self.engine,
            "version": self.version,
            "file": {"name": self.file_name, "text": self.text},
            "settings": dict(self.settings),
            "command": shlex.join(self.command()),
            "flags": None if self.flags is None else shlex.join(self.flags),
            "losses": [asdict(item) for item in self.losses],
            "changes": [asdict(item) for item in self.changes],
            "conversions": [asdict(item) for item in self.conversions],
            "needs": list(self.needs),
        }

    def table(self) -> str:
        """The export as text for people: file, command, and what to know before using them."""
        return export_text(self)
