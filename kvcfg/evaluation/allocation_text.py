"""Formats that were found, as overrides to paste and as a table of layers."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvcfg.composition import overrides_of
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.presets import preset_values
from kvcfg.config.quantization import LayerFormat, QuantizationConfig
from kvcfg.errors import show
from kvcfg.planning.layer_formats import FOUND_FORMATS
from kvcfg.planning.layout import aligned, command_words, counted, paragraph

if TYPE_CHECKING:
    from kvcfg.evaluation.allocation import FoundFormats

_PRESET = "bits4"


def recipe_overrides(experiment: ExperimentConfig) -> tuple[str, ...]:
    """The `quantization` group of an experiment as overrides: the preset it is built on, and what differs."""
    asked = experiment.quantization
    preset = QuantizationConfig.model_validate(preset_values("quantization")[_PRESET])
    spelled = {word.partition("=")[0]: word for word in overrides_of(experiment)}
    words = [f"quantization={_PRESET}"]
    for name in QuantizationConfig.model_fields:
        key, value = f"quantization.{name}", getattr(asked, name)
        if name == "layers" and value is not None:
            words.append(f"{key}=[{','.join(map(_spelled_layers, value))}]")
        elif value != getattr(preset, name):
            words.append(spelled.get(key, f"{key}={show(value)}"))
    return tuple(words)


def found_text(found: FoundFormats) -> str:
    """What was found, what it loses, and the overrides, as sections that an empty line separates."""
    row, workload = found.row, found.experiment.workload
    low, high = row.kl_ci
    head = (
        f"{row.model}: {row.bits_per_element:.2f} bits an element, {row.bytes_per_token_planned:,.0f} bytes a token. "
        f"KL {found.kl_predicted:.3g} predicted, by probes on {workload.window_tokens:,} tokens from token "
        f"{found.found_from:,}; {row.kl:.3g} [{low:.3g}, {high:.3g}] measured on "
        f"{counted(workload.num_windows, 'window')} of {workload.window_tokens:,} tokens from token "
        f"{workload.first_token:,}."
    )
    rows = [
        (name, _layers_of(found, name, "key"), _layers_of(found, name, "value"))
        for name in FOUND_FORMATS
        if name in found.formats.values()
    ]
    words = [shlex.quote(word) for word in found.overrides]
    sections = [
        paragraph(head),
        aligned([("format", "keys of layers", "values of layers"), *rows], "<<<", indent=0),
        ["In the place of quantization=auto", *command_words(words)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _spelled_layers(item: LayerFormat) -> str:
    parts = [f"layers:[{','.join(map(str, item.layers or ()))}]"]
    parts += [
        f"{name}:{value}"
        for name in ("kind", "format", "key_format", "value_format")
        if (value := getattr(item, name)) is not None
    ]
    return "{" + ",".join(parts) + "}"


def _layers_of(found: FoundFormats, format_name: str, what: str) -> str:
    layers = [side.layer for side, name in found.formats.items() if (name, side.what) == (format_name, what)]
    return " ".join(_ranges(layers)) or "-"


def _ranges(numbers: Sequence[int]) -> Iterable[str]:
    """Sorted numbers, runs of them as first-last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
