"""The recipe of every layer: what the `cache` and `quantization` groups ask for together, with nothing left open."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from kvcfg.config.model import LayerGroup, ModelConfig
from kvcfg.config.presets import preset_values
from kvcfg.config.quantization import LayerFormat, QuantizationConfig
from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError, Problem
from kvcfg.formats import CENTRED, FORMATS, STORED_SCALES, Format, Recipe, Transform

if TYPE_CHECKING:
    from kvcfg.config.experiment import ExperimentConfig


AUTO = "auto"
"""Format of keys and of values that `kvcfg fit` is to find for every layer."""


class StoredLayers(NamedTuple):
    """Layers that keep the same in the same recipe.

    Attributes:
        group: the layers; a part of one of the model's groups where layers have formats of their own.
        recipe: how they are stored; of no consequence for layers that store no pages.
    """

    group: LayerGroup
    recipe: Recipe


def resolve_recipe(experiment: ExperimentConfig) -> Recipe:
    """The recipe of layers that keep keys and values of every token and have no format of their own.

    Raises:
        ConfigError: if formats are still to be found.
    """
    asked = experiment.quantization
    if finds_formats(experiment):
        rule = f"is found by measuring; first run kvcfg fit quantization={AUTO} gate.max_kl=0.005, which prints formats"
        raise ConfigError(Problem("quantization.key_format", rule, AUTO, "quantization=bits4"))
    default = experiment.cache.kv_cache_format or experiment.model.dtype
    return _recipe(
        asked, FORMATS[(asked.key_format or default).lower()], FORMATS[(asked.value_format or default).lower()]
    )


def finds_formats(experiment: ExperimentConfig) -> bool:
    """Whether formats are to be found for every layer, so that nothing but `kvcfg fit` can run."""
    return AUTO in (experiment.quantization.key_format, experiment.quantization.value_format)


def stored_layers(experiment: ExperimentConfig) -> list[StoredLayers]:
    """Every layer group of the model with its recipe, in order; groups whose layers differ are split."""
    whole, asked = resolve_recipe(experiment), experiment.quantization
    stored = []
    for group in experiment.model.layer_groups:
        if group.kind in ("linear", "shared"):
            stored.append(StoredLayers(group, whole))
            continue
        recipes: dict[Recipe, list[int]] = {}
        for layer in layers_of(group):
            recipes.setdefault(_of_kind(group, _of_layer(asked, whole, group, layer)), []).append(layer)
        for recipe, layers in recipes.items():
            part = group
            if len(recipes) > 1:
                part = group.model_copy(update={"layers": tuple(layers), "num_layers": len(layers)})
            stored.append(StoredLayers(part, recipe))
    return stored


def layers_of(group: LayerGroup) -> tuple[int, ...]:
    """Which layers of the model a group holds; counted from 0 where it does not say."""
    return group.layers or tuple(range(group.num_layers))


def drafted_recipe(group: LayerGroup, recipe: Recipe) -> Recipe:
    """How a drafter's layers are stored: as the model's that keep the same, but for what was calibrated on those."""
    if recipe.transform == "balanced":
        recipe = replace(recipe, transform="centred")
    if recipe.scale_source == "static":
        recipe = replace(recipe, scale_source="unit")
    return _of_kind(group, recipe)


def balances_rope(experiment: ExperimentConfig) -> bool:
    """Whether RoPE pairs are balanced when the experiment's model is loaded."""
    asked = experiment.quantization.balance_rope
    return balancing_gains(experiment.model, resolve_recipe(experiment))[0] if asked is None else asked


def balancing_gains(model: ModelConfig, recipe: Recipe) -> tuple[bool, str]:
    """Whether balanced keys are stored with less loss than others, and why."""
    if not any(group.kind in ("full", "sliding_window", "chunked") for group in model.layer_groups):
        return False, f"{model.name} keeps no keys of single heads"
    if recipe.key_format.bits >= 16:
        return False, f"{recipe.key_format.name} holds every channel as it is"
    if recipe.scale_source == "unit":
        return False, "a scale of 1 is the same for all keys"
    return True, "channels that share a scale lose least when none stands out"


def needs_calibration(recipe: Recipe) -> bool:
    """Whether a recipe reads what `kvcfg calibrate` wrote."""
    return recipe.transform == "balanced" or recipe.scale_source == "static"


def is_measured(recipe: Recipe) -> bool:
    """Whether a recipe is one of those in conf/quantization, or stores 8 bits and more in the plain way."""
    plain = replace(recipe, scale_dtype=DType.float32, block_size=None)
    simple = Recipe(recipe.key_format, recipe.value_format, recipe.granularity, recipe.scale_source, DType.float32)
    wide = not (recipe.key_format.is_packed or recipe.value_format.is_packed)
    return (plain == simple and wide and not recipe.closes and recipe.scale_source != "static") or recipe in _measured()


@cache
def _measured() -> frozenset[Recipe]:
    presets = (QuantizationConfig.model_validate(values) for values in preset_values("quantization").values())
    return frozenset(
        _recipe(asked, FORMATS[asked.key_format], FORMATS[asked.value_format])
        for asked in presets
        if asked.key_format in FORMATS and asked.value_format in FORMATS
    )


def _recipe(asked: QuantizationConfig, keys: Format, values: Format) -> Recipe:
    if not (keys.scaled or values.scaled):
        return Recipe(keys, values, "none", "unit", DType.float32)
    granularity = asked.granularity or ("tensor" if asked.scale_source in ("unit", "static") else "token_head")
    packed = keys.is_packed or values.is_packed
    transform = asked.transform or _default_transform(asked, keys, packed)
    sink_tokens = asked.sink_tokens
    whole = (
        packed
        or transform in CENTRED
        or asked.open_page_format is not None
        or "channel" in (granularity, asked.key_granularity)
    )
    return Recipe(
        keys,
        values,
        granularity,
        asked.scale_source or ("dynamic" if granularity in STORED_SCALES else "unit"),
        DType[asked.scale_dtype or ("float16" if whole else "float32")],
        asked.quantization_granularity,
        asked.key_granularity,
        asked.key_quantization_granularity,
        transform,
        None if asked.open_page_format is None else FORMATS[asked.open_page_format],
        (1 if transform in CENTRED else 0) if sink_tokens is None else sink_tokens,
    )


def _default_transform(asked: QuantizationConfig, keys: Format, packed: bool) -> Transform:
    """Centred where it can be: it loses least below 8 bits."""
    shared = asked.key_granularity or asked.granularity or "token_head"
    signed = asked.scale_dtype != "float8_e8m0fnu"
    return "centred" if packed and keys.scaled and signed and shared in ("token_head", "block") else "none"


def _of_layer(asked: QuantizationConfig, whole: Recipe, group: LayerGroup, layer: int) -> Recipe:
    said = None
    for item in asked.layers or ():
        if names_layer(item, group, layer):
            said = item
    if said is None:
        return whole
    keys, values = said.key_format or said.format, said.value_format or said.format
    return _recipe(
        asked,
        whole.key_format if keys is None else FORMATS[keys],
        whole.value_format if values is None else FORMATS[values],
    )


def names_layer(item: LayerFormat, group: LayerGroup, layer: int) -> bool:
    """Whether a layer of a group is one of those that have formats of their own."""
    return (not item.layers or layer in item.layers) and item.kind in (None, group.kind)


def _of_kind(group: LayerGroup, recipe: Recipe) -> Recipe:
    """A recipe as layers of a kind can have it.

    A window gives up a page soon after it is full, so there a page stays as it was while it was filled. A latent has
    a RoPE part that must not be mixed with the rest.
    """
    if group.kind == "mla" and recipe.transform != "none":
        recipe = replace(recipe, transform="none", sink_tokens=0)
    if group.window is not None and recipe.open_page is not None:
        return recipe.open_page
    return recipe
