"""An experiment with formats of their own for the keys and values of single layers, and what they take.

    quantization=auto ──starting_point──► bits4 ──with_formats──► bits4 and what layers differ in

Only layers that keep every token are open to choice: a windowed layer is stored as its pages are while they fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal, NamedTuple

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.problems import check
from kvcfg.config.quantization import LayerFormat, QuantizationConfig
from kvcfg.config.recipes import is_measured, layers_of, resolve_recipe, stored_layers
from kvcfg.errors import ConfigError, Problem
from kvcfg.planning.plans import plan

FOUND_FORMATS = ("gauss2", "gauss3", "gauss4", "gauss5", "gauss6", "int8")
"""Formats that a layer's keys, or values, may be given, the smallest first."""

START_FORMAT = "gauss4"
"""The format of layers that nothing is said of: that of quantization=bits4, on which the rest is built."""


class Side(NamedTuple):
    """The keys, or the values, of one layer."""

    layer: int
    what: Literal["key", "value"]


def starting_point(experiment: ExperimentConfig) -> ExperimentConfig:
    """The experiment in the formats of `quantization=bits4`, in place of those to be found.

    Raises:
        ConfigError: if the rest of the recipe does not suit formats below 8 bits.
    """
    formats = {"key_format": START_FORMAT, "value_format": START_FORMAT}
    start = _checked(experiment, experiment.quantization.model_copy(update=formats))
    # What follows from the formats must not change with those of single layers.
    recipe = resolve_recipe(start)
    kept = {"transform": recipe.transform, "scale_dtype": recipe.scale_dtype.name}
    return _checked(start, start.quantization.model_copy(update=kept))


def open_sides(start: ExperimentConfig) -> tuple[Side, ...]:
    """All sides whose format may be chosen.

    Raises:
        ConfigError: if no layer keeps every token, or it is not known which layers do.
    """
    groups = [layers.group for layers in stored_layers(start) if layers.group.elements_per_token]
    growing = [group for group in groups if group.window is None]
    model = start.model
    if len(model.layer_groups) > 1 and any(group.layers is None for group in groups):
        rule = f"does not suit {model.name}, whose groups do not say which layers they hold"
        raise ConfigError(Problem("quantization", rule, "auto", "quantization=bits4"))
    if not growing:
        rule = f"does not suit {model.name}: none of its layers keeps every token"
        raise ConfigError(Problem("quantization", rule, "auto", "quantization=int8"))
    sides = [
        Side(layer, what)
        for group in growing
        for layer in layers_of(group)
        for what in (("key", "value") if group.value_dim else ("key",))
    ]
    return tuple(sorted(sides))


def with_formats(start: ExperimentConfig, formats: Mapping[Side, str]) -> ExperimentConfig:
    """The starting point with the formats of some sides; the others keep theirs.

    `quantization.experimental` is set where a layer then has a recipe that no preset stands for.
    """
    by_layer: dict[int, dict[str, str]] = {}
    for side, name in sorted(formats.items()):
        by_layer.setdefault(side.layer, {})[side.what] = name
    alike: dict[tuple[str | None, str | None], list[int]] = {}
    for layer, named in by_layer.items():
        if set(named.values()) != {START_FORMAT}:
            alike.setdefault((named.get("key"), named.get("value")), []).append(layer)
    layers = tuple(
        LayerFormat(layers=tuple(numbers), key_format=key, value_format=value)
        for (key, value), numbers in alike.items()
    )
    found = with_layers(start, layers)
    groups = [item for item in stored_layers(found) if item.group.elements_per_token and item.group.window is None]
    measured = all(is_measured(item.recipe) for item in groups)
    return with_layers(start, layers, experimental=start.quantization.experimental or not measured)


def with_layers(start: ExperimentConfig, layers: Sequence[LayerFormat], **others: object) -> ExperimentConfig:
    """The starting point with `quantization.layers`, and other values of the group."""
    return _checked(start, start.quantization.model_copy(update={"layers": tuple(layers) or None, **others}))


def side_bytes(start: ExperimentConfig, sides: Sequence[Side], format_name: str) -> dict[Side, int]:
    """Bytes of a page of each side in a format, scales and sinks included, over all shards of a replica."""
    experiment = with_formats(start, dict.fromkeys(sides, format_name))
    params = iter(experiment.to_params().params)
    found = {}
    for stored in stored_layers(experiment):
        if stored.group.kind == "shared":
            continue
        group = next(params)
        for layer in layers_of(stored.group):
            for what, recipe, dim in (
                ("key", group.storage.keys, group.head_dim),
                ("value", group.storage.values, group.value_dim),
            ):
                shape = (group.page_size, group.n_kv_heads_per_device, dim)
                taken = recipe.element_bytes(*shape) + recipe.scale_bytes(*shape)
                found[layer, what] = taken * group.tensor_parallel_degree
    return {side: found[side] for side in sides}


def bytes_for_sides(start: ExperimentConfig, sides: Sequence[Side]) -> float:
    """Bytes that a page of all sides may take together, so that the workload fits; infinite if memory is no limit.

    The pages that are being filled are counted for every layer, also where one stores them like any other.

    Raises:
        ConfigError: if it is not said how many sequences are to fit.
    """
    planned = plan(start)
    if start.cache.kv_cache_memory_bytes is None:
        return inf
    if start.workload.max_batch_size is None:
        rule = "must say how many sequences are to fit in cache.kv_cache_memory_bytes"
        raise ConfigError(Problem("workload.max_batch_size", rule, None, "workload.max_batch_size=1"))
    capacity = planned.capacity
    num_pages = capacity.max_batch_size * capacity.pages_per_sequence + 1  # one more: the null page
    own = num_pages * sum(side_bytes(start, sides, START_FORMAT).values())
    return (capacity.budget - (capacity.needed.total - own)) // num_pages


def _checked(experiment: ExperimentConfig, quantization: QuantizationConfig) -> ExperimentConfig:
    groups = {name: getattr(experiment, name) for name in ExperimentConfig.model_fields}
    made, problems = check(groups | {"quantization": quantization})
    if made is None:
        raise ConfigError(problems)
    return made
