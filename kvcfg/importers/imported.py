"""What an import is: overrides, and what of the engine's settings they do not say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import show
from kvcfg.planning.layout import command_words, paragraph


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A setting of the engine that no key of kvcfg stands for.

    Attributes:
        setting: the setting, as the engine calls it.
        value: its value.
        why: what is the matter with it.
    """

    setting: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.setting}={show(self.value)}: {self.why}"


@dataclass(frozen=True, slots=True)
class ReadAs:
    """A setting that means something a little different here, or that the engine fills in itself.

    Attributes:
        setting: the setting, as the engine calls it.
        value: its value, stated or the engine's default.
        override: what it became.
        how: how the two differ.
    """

    setting: str
    value: Any
    override: str
    how: str

    def __str__(self) -> str:
        return f"{self.setting}={show(self.value)} → {self.override}: {self.how}"


@dataclass(frozen=True, slots=True)
class Imported:
    """An engine's settings as a config.

    Attributes:
        engine: whose settings they were.
        version: the version whose rules were followed.
        overrides: what composes the config.
        experiment: the config.
        read_as: settings that were not taken word for word.
        left_out: settings that were not taken at all.
    """

    engine: str
    version: str
    overrides: tuple[str, ...]
    experiment: ExperimentConfig
    read_as: tuple[ReadAs, ...]
    left_out: tuple[LeftOut, ...]

    def to_dict(self) -> dict[str, Any]:
        """The import as plain values that JSON can hold."""
        return {
            "engine": self.engine,
            "version": self.version,
            "overrides": list(self.overrides),
            "config": self.experiment.model_dump(mode="json"),
            "read_as": [asdict(item) for item in self.read_as],
            "left_out": [asdict(item) for item in self.left_out],
        }

    def table(self) -> str:
        """The import as text for people: a command to paste, and what it does not say."""
        sections = [
            [f"{self.engine} {self.version}, as kvcfg says it:", *command_words(["kvcfg plan", *self.overrides])],
            _section("Read as:", self.read_as),
            _section("Left out:", self.left_out),
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _section(title: str, items: tuple[object, ...]) -> list[str]:
    return [title, *(line for item in items for line in paragraph(str(item), indent=2))] if items else []
