"""Experiments back to overrides, spelled as a command line takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvcfg.composition.composer import Composer
from kvcfg.composition.points import compose_point
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import show


def overrides_of(experiment: ExperimentConfig) -> list[str]:
    """Overrides that compose an equal experiment: presets by the names it bears, and every value that differs."""
    composer = Composer()
    named = [f"{group}={getattr(experiment, group).name}" for group in ("model", "devices")]
    presets = [choice for choice in named if choice.partition("=")[2] in composer.choices(choice.partition("=")[0])]
    start = compose_point(composer, presets).experiment or ExperimentConfig()
    return [*presets, *_differences(start.model_dump(mode="json"), experiment.model_dump(mode="json"))]


def _differences(start: Mapping[str, Any], end: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in end.items():
        before = start.get(key)
        if isinstance(value, Mapping):
            yield from _differences(before if isinstance(before, Mapping) else {}, value, f"{path}{key}.")
        elif value != before:
            yield f"{path}{key}={quoted(value)}"


def quoted(value: Any) -> str:
    """A value as an override spells it, with quotes where the grammar needs them."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{quoted(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(quoted, value)) + "]"
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z_/][\w/.@+-]*", value):
        return show(value)
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return f"'{escaped}'"
