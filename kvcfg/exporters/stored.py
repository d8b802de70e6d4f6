"""How elements are stored, as engines tell it apart, and the nearest that an engine has.

Engines fuse the element format and its scales into one name (`fp8_per_token_head`); here they are two things, and a
table of each engine says which pairs it has a name for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import resolve_recipe, stored_layers
from kvcfg.errors import show
from kvcfg.exporters.sheet import Sheet
from kvcfg.formats import FORMATS, Recipe, SideRecipe


class Stored(NamedTuple):
    """An element format and the scales beside it.

    Attributes:
        format: name of the element format.
        scales: none, tensor (1, or calibrated), head, token_head, channel, or the size and type of blocks.
    """

    format: str
    scales: str

    def __str__(self) -> str:
        return self.format if self.scales == "none" else f"{self.format} with scales per {self.scales}"


_OF_THE_RECIPE = (
    "granularity", "quantization_granularity", "key_granularity", "key_quantization_granularity", "scale_dtype",
    "scale_source", "key_format", "value_format", "transform", "sink_tokens", "open_page_format",
)  # fmt: skip
"""Keys of the group `quantization` that say how an element is stored."""

NVFP4 = Stored("float4_e2m1fn", "block of 16 in float8_e4m3fn")
MXFP4_16 = Stored("float4_e2m1fn", "block of 16 in float8_e8m0fnu")
MXFP8 = Stored("float8_e4m3fn", "block of 32 in float8_e8m0fnu")
E4M3 = Stored("float8_e4m3fn", "tensor")
E5M2 = Stored("float8_e5m2", "tensor")


def plain(name: str) -> Stored:
    """A format that holds numbers as they are."""
    return Stored(name, "none")


def per_token_head(name: str) -> Stored:
    """A format with a scale for each token and head."""
    return Stored(name, "token_head")


def stored_as(side: SideRecipe, recipe: Recipe) -> Stored:
    """What the keys, or the values, of a recipe are."""
    if not side.element_format.scaled:
        return plain(side.element_format.name)
    if side.granularity == "block":
        return Stored(side.element_format.name, f"block of {side.block_size} in {recipe.scale_dtype.name}")
    scales = "tensor" if side.granularity == "none" else side.granularity
    return Stored(side.element_format.name, scales)


def recipe_of(stored: Stored) -> dict[str, Any]:
    """What the keys of the group `quantization` are for elements stored like this; those left out are null."""
    if stored.scales == "tensor":
        return {"granularity": "tensor", "scale_source": "unit"}
    if stored.scales.startswith("block"):
        _, _, size, _, dtype = stored.scales.split()
        blocks = {"granularity": "block", "quantization_granularity": int(size), "scale_dtype": dtype}
        return blocks | {"transform": "none"}
    return {}


def fix_for(experiment: ExperimentConfig, stored: Stored) -> str:
    """Overrides after which an experiment stores like this, and is as it was in everything else."""
    target = {f"quantization.{key}": recipe_of(stored).get(key) for key in _OF_THE_RECIPE}
    now = {f"quantization.{key}": getattr(experiment.quantization, key) for key in _OF_THE_RECIPE}
    changed = {key: value for key, value in target.items() if value != now[key]}
    return " ".join(
        f"{key}={show(value)}" for key, value in {"cache.kv_cache_format": stored.format, **changed}.items()
    )


def nearest_stored(asked: Stored, table: Mapping[Stored, str]) -> Stored:
    """Of what an engine has the one that is most like what was asked for: as many bits, then the same scales."""
    bits = FORMATS[asked.format].bits

    def distance(other: Stored) -> tuple[int, bool, bool]:
        return abs(FORMATS[other.format].bits - bits), other.format != asked.format, other.scales != asked.scales

    return min(table, key=distance)


def engine_format(sheet: Sheet, table: Mapping[Stored, str], auto: str | None = None) -> str | None:
    """The engine's name for how keys and values are stored; refuses on the sheet what has none.

    Args:
        sheet: the export in the making.
        table: the engine's names.
        auto: its name for the format that the model computes in; None if it has none.
    """
    experiment = sheet.experiment
    recipe = resolve_recipe(experiment)
    keys, values = stored_as(recipe.keys, recipe), stored_as(recipe.values, recipe)
    if keys != values:
        shared = min(keys, values, key=lambda item: item not in table)
        rule = f"stores keys in {keys} and values in {values}, which {sheet.engine} cannot"
        sheet.refuse("quantization.value_format", rule, fix_for(experiment, nearest_stored(shared, table)))
        return None
    name = table.get(keys)
    if auto is not None and keys == plain(experiment.model.dtype):
        name = auto
    if name is None:
        rule = f"{sheet.engine} {sheet.version} has no {keys}"
        sheet.refuse("cache.kv_cache_format", rule, fix_for(experiment, nearest_stored(keys, table)))
    sheet.say("cache.kv_cache_format")
    return name


def refuse_layers(sheet: Sheet) -> None:
    """Refuse formats of single layers, for engines that store all layers alike."""
    if differing_layers(sheet.experiment):
        rule = f"are stored in formats of their own, and {sheet.engine} stores all layers alike"
        sheet.refuse("quantization.layers", rule, "quantization.layers=null")


def differing_layers(experiment: ExperimentConfig) -> dict[int, Recipe]:
    """Layers that `quantization.layers` gives another recipe than the rest have."""
    if experiment.quantization.layers is None:
        return {}
    whole = resolve_recipe(experiment)
    rest = {recipe for recipe in (whole, whole.open_page) if recipe is not None}
    return {
        layer: stored.recipe
        for stored in stored_layers(experiment)
        if stored.group.kind not in ("linear", "shared") and stored.recipe not in rest
        for layer in (stored.group.layers or range(stored.group.num_layers))
    }
