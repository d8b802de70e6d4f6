"""What must agree for a recipe: formats, scales, transforms, and the heads and pages that they are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcfg.config.drafts import all_layers, draft_layers
from kvcfg.config.recipes import AUTO, finds_formats, layers_of, names_layer, resolve_recipe
from kvcfg.config.rulebook import DRAFT_KEYS, FORMAT_KEYS, Rulebook
from kvcfg.errors import Problem, nearest, one_of
from kvcfg.formats import CENTRED, FORMATS, PACKED_MULTIPLE, STORED_SCALES, Format

if TYPE_CHECKING:
    from kvcfg.config.experiment import ExperimentConfig

RECIPE_KEYS = (*FORMAT_KEYS, "quantization.granularity", "quantization.scale_source", "model.dtype")
FOUND_KEYS = ("quantization.key_format", "quantization.value_format")
RECIPE_RULES = Rulebook()


@RECIPE_RULES.rule(*FORMAT_KEYS, "quantization.open_page_format", "quantization.layers")
def formats_exist(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Every format that is named is in the table."""
    named = _named_formats(experiment)
    if experiment.quantization.open_page_format is not None:
        named["quantization.open_page_format"] = experiment.quantization.open_page_format
    for place, item in enumerate(experiment.quantization.layers or ()):
        for field in ("format", "key_format", "value_format"):
            if (name := getattr(item, field)) is not None:
                named[f"quantization.layers.{place}.{field}"] = name
    for key, name in named.items():
        if name.lower() not in FORMATS and (name != AUTO or key not in FOUND_KEYS):
            close = nearest(name, list(FORMATS))
            yield Problem(key, one_of(list(FORMATS)), name, f"{key}={close or 'bfloat16'}")


@RECIPE_RULES.rule(*FORMAT_KEYS)
def formats_agree(experiment: ExperimentConfig) -> Iterator[Problem]:
    """`cache.kv_cache_format` and the formats of the recipe say the same where both speak."""
    asked = _named_formats(experiment)
    cache_format = asked.pop("cache.kv_cache_format", None)
    for key, name in asked.items():
        if cache_format is not None and name.lower() != cache_format.lower():
            rule = f"must be null or equal to cache.kv_cache_format={cache_format}, which says it for keys and values"
            yield Problem(key, rule, name, "cache.kv_cache_format=null")


@RECIPE_RULES.rule(*FOUND_KEYS, "quantization.layers")
def formats_are_found_for_all(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Where formats are to be found, they are found for keys and values of all layers together."""
    if not finds_formats(experiment):
        return
    asked = experiment.quantization
    for key, name in zip(FOUND_KEYS, (asked.key_format, asked.value_format), strict=True):
        if name != AUTO:
            rule = f"must be {AUTO} too: formats of keys and values are found together"
            yield Problem(key, rule, name, f"{key}={AUTO}")
    if asked.layers is not None:
        rule = f"must be null for quantization={AUTO}, which finds the formats of all layers"
        yield Problem("quantization.layers", rule, ..., "quantization.layers=null")


@RECIPE_RULES.rule(*RECIPE_KEYS)
def scaled_formats_have_scales(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A format that needs scales gets them; fp8 may be told that its scale is 1."""
    scaled = _scaled_formats(experiment)
    if experiment.quantization.granularity != "none" or not scaled:
        return
    key, granularity = "quantization.granularity", "tensor" if all(_is_float(item) for item in scaled) else "token_head"
    names = " and ".join(dict.fromkeys(item.name for item in scaled))
    unit = "; tensor stores with a scale of 1, token_head with the best one" if granularity == "tensor" else ""
    yield Problem(key, f"must not be none for {names}, which needs scales{unit}", "none", f"{key}={granularity}")


@RECIPE_RULES.rule(*RECIPE_KEYS, "quantization.scale_dtype", "quantization.transform", "quantization.open_page_format")
def scales_have_a_format(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Scales are asked for only where a format is scaled."""
    asked, formats = experiment.quantization, _formats(experiment)
    if not formats or any(item.scaled for item in formats):
        return
    names = " and ".join(dict.fromkeys(item.name for item in formats))
    rule = f"must be null for {names}, which holds numbers as they are and has no scales"
    for name in ("granularity", "key_granularity", "scale_source", "scale_dtype", "transform", "open_page_format"):
        value = getattr(asked, name)
        if value not in (None, "none"):
            yield Problem(f"quantization.{name}", rule, value, f"quantization.{name}=null")


@RECIPE_RULES.rule("quantization.granularity", "quantization.scale_source")
def scales_are_as_fine_as_their_source(experiment: ExperimentConfig) -> Iterator[Problem]:
    """One scale for a whole tensor or head cannot follow numbers that are not there yet; finer ones always do."""
    asked, key = experiment.quantization, "quantization.scale_source"
    if asked.granularity in ("tensor", "head") and asked.scale_source == "dynamic":
        finer = "dynamic scales are per token_head, block or channel"
        rule = f"must be unit or static for granularity={asked.granularity}: {finer}"
        yield Problem(key, rule, "dynamic", f"{key}=unit")
    if asked.granularity in STORED_SCALES and asked.scale_source in ("unit", "static"):
        rule = f"must be dynamic for granularity={asked.granularity}, whose scales are stored beside the numbers"
        yield Problem(key, rule, asked.scale_source, f"{key}=dynamic")


@RECIPE_RULES.rule(*RECIPE_KEYS, "quantization.scale_dtype", *DRAFT_KEYS)
def packed_formats_can_be_stored(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Formats below 8 bits have scales that follow the numbers, and heads that fill whole bytes."""
    asked, packed = experiment.quantization, [item for item in _formats(experiment) if item.is_packed]
    known = list(dict.fromkeys(item.name for item in packed))
    names = " and ".join(known)
    if packed and asked.granularity in ("tensor", "head"):
        key = "quantization.granularity"
        rule = f"{one_of(STORED_SCALES)} for {names}, whose few levels need scales that follow the numbers"
        yield Problem(key, rule, asked.granularity, f"{key}=token_head")
    if asked.scale_dtype == "float8_e8m0fnu" and (signed := [item.name for item in packed if item.asymmetric]):
        key, rule = "quantization.scale_dtype", f"must have a sign for {signed[0]}, which stores zeros too"
        yield Problem(key, rule, asked.scale_dtype, f"{key}=null")
    uneven = [dim for dim in _stored_dims(experiment) if dim % PACKED_MULTIPLE]
    if packed and uneven:
        key, name = next((key, name) for key, name in _named_formats(experiment).items() if name.lower() in known)
        rule = f"packs whole bytes and needs head_dim to be a multiple of {PACKED_MULTIPLE}, which {uneven[0]} is not"
        yield Problem(key, rule, name, f"{key}=int8")


@RECIPE_RULES.rule("quantization.granularity", "quantization.quantization_granularity", *DRAFT_KEYS)
def blocks_have_a_size(experiment: ExperimentConfig) -> Iterator[Problem]:
    """granularity=block and its size come together."""
    asked, key = experiment.quantization, "quantization.quantization_granularity"
    if asked.granularity == "block" and asked.quantization_granularity is None:
        size = _largest_common_block(experiment, 32)
        yield Problem(key, "must be given for granularity=block: numbers that share a scale", None, f"{key}={size}")
    if asked.granularity != "block" and asked.quantization_granularity is not None:
        rule = f"must be null unless quantization.granularity=block (it is {asked.granularity or 'null'})"
        yield Problem(key, rule, asked.quantization_granularity, f"{key}=null")


@RECIPE_RULES.rule("quantization.granularity", "quantization.quantization_granularity", *DRAFT_KEYS)
def blocks_divide_heads(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A head is a whole number of blocks, in every layer group of the model and of its drafter."""
    asked, key = experiment.quantization, "quantization.quantization_granularity"
    size = asked.quantization_granularity
    if asked.granularity != "block" or size is None:
        return
    uneven = [dim for dim in _stored_dims(experiment) if dim % size]
    if uneven:
        dims = " and ".join(str(dim) for dim in uneven)
        fix = f"{key}={_largest_common_block(experiment, size)}"
        where = experiment.model.name + (" and its drafter" if draft_layers(experiment).groups else "")
        yield Problem(key, f"must divide head_dim, which is {dims} in {where}", size, fix)


@RECIPE_RULES.rule("quantization", "cache.kv_cache_format", "cache.kv_cache_page_size", *DRAFT_KEYS)
def keys_have_scales_of_their_own(experiment: ExperimentConfig) -> Iterator[Problem]:
    """key_granularity is one that stores scales, and its size divides what it cuts."""
    asked, key = experiment.quantization, "quantization.key_quantization_granularity"
    granularity, size = asked.key_granularity, asked.key_quantization_granularity
    if granularity is not None and granularity not in STORED_SCALES:
        rule = f"{one_of(STORED_SCALES)}, or null to be that of values"
        yield Problem("quantization.key_granularity", rule, granularity, "quantization.key_granularity=null")
    elif granularity == "block" and size is None:
        fix = f"{key}={_largest_common_block(experiment, 32)}"
        yield Problem(key, "must be given for key_granularity=block: numbers that share a scale", None, fix)
    elif granularity not in ("block", "channel") and size is not None:
        rule = f"must be null unless quantization.key_granularity is block or channel (it is {granularity or 'null'})"
        yield Problem(key, rule, size, f"{key}=null")
    elif granularity == "block" and size is not None and any(dim % size for dim in _stored_dims(experiment)):
        rule = "must divide head_dim, which is " + " and ".join(str(dim) for dim in _stored_dims(experiment))
        yield Problem(key, rule, size, f"{key}={_largest_common_block(experiment, size)}")
    elif granularity == "channel" and size is not None and experiment.cache.kv_cache_page_size % size:
        rule = f"must divide cache.kv_cache_page_size={experiment.cache.kv_cache_page_size}, tokens of a page"
        yield Problem(key, rule, size, f"{key}=null")


@RECIPE_RULES.rule("quantization", "cache.kv_cache_format", "cache.kv_cache_page_size", "model.dtype")
def means_are_taken_from_scaled_keys(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A centred transform needs scales per token and head or block, and sinks need a centred transform."""
    asked, formats = experiment.quantization, _formats(experiment)
    shared = asked.key_granularity or asked.granularity or "token_head"
    if formats and any(item.scaled for item in formats) and asked.transform in CENTRED:
        if shared not in ("token_head", "block"):
            key = "quantization.granularity" if asked.key_granularity is None else "quantization.key_granularity"
            rule = f"must be token_head or block for transform={asked.transform}, which takes the mean of channels away"
            yield Problem(key, rule, shared, f"{key}=null")
        if not formats[0].scaled:
            rule = f"must be none or hadamard where keys are {formats[0].name}, which holds numbers as they are"
            yield Problem("quantization.transform", rule, asked.transform, "quantization.transform=hadamard")
        if asked.scale_dtype == "float8_e8m0fnu":
            key, rule = (
                "quantization.scale_dtype",
                f"must have a sign for transform={asked.transform}: means are stored too",
            )
            yield Problem(key, rule, asked.scale_dtype, f"{key}=null")
    if formats and asked.sink_tokens:
        key, size = "quantization.sink_tokens", experiment.cache.kv_cache_page_size
        if resolve_recipe(experiment).transform not in CENTRED:
            rule = "must be null or 0 unless quantization.transform is centred or balanced"
            yield Problem(key, rule, asked.sink_tokens, f"{key}=null")
        elif asked.sink_tokens >= size:
            yield Problem(key, f"must be less than the {size} tokens of a page", asked.sink_tokens, f"{key}=1")


@RECIPE_RULES.rule("quantization.open_page_format")
def open_pages_are_fine(experiment: ExperimentConfig) -> Iterator[Problem]:
    """The newest tokens are stored one by one, and lose too much below 8 bits."""
    name, key = experiment.quantization.open_page_format, "quantization.open_page_format"
    if name in FORMATS and FORMATS[name].is_packed:
        rule = f"must have 8 bits or more, which {name} has not: the newest tokens are read most"
        yield Problem(key, rule, name, f"{key}=int8")


@RECIPE_RULES.rule("quantization", "cache.kv_cache_format")
def calibrations_are_read(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A calibration is told only where something of it is used."""
    asked, key = experiment.quantization, "quantization.calibration"
    if asked.calibration is not None and asked.transform != "balanced" and asked.scale_source != "static":
        rule = "is read only for quantization.transform=balanced or quantization.scale_source=static"
        yield Problem(key, rule, asked.calibration, f"{key}=null")


@RECIPE_RULES.rule("quantization.layers", "model.layer_groups")
def layers_with_own_formats_exist(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Every layer that is named is there, and stores keys."""
    groups = [group for group in experiment.model.layer_groups if group.elements_per_token]
    untold = len(experiment.model.layer_groups) > 1 and any(group.layers is None for group in groups)
    known = {(layer, group.kind) for group in groups for layer in layers_of(group)}
    for place, item in enumerate(experiment.quantization.layers or ()):
        key, fix = f"quantization.layers.{place}", "quantization.layers=null"
        if item.layers and untold:
            rule = f"cannot name layers of {experiment.model.name}, whose groups do not say which layers they hold"
            yield Problem(f"{key}.layers", rule, item.layers, fix)
        elif item.layers and (missing := set(item.layers) - {layer for layer, _ in known}):
            layers = sorted(layer for layer, _ in known)
            rule = (
                f"names layer {min(missing)}; {experiment.model.name} stores keys in layers {layers[0]} to {layers[-1]}"
            )
            yield Problem(f"{key}.layers", rule, item.layers, fix)
        elif not any(names_layer(item, group, layer) for group in groups for layer in layers_of(group)):
            kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
            yield Problem(
                f"{key}.kind", f"names no layer: those of {experiment.model.name} are {kinds}", item.kind, fix
            )


@RECIPE_RULES.rule(*FORMAT_KEYS, *DRAFT_KEYS)
def latents_have_one_format(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A model of latents alone stores no values, so a format for them would do nothing."""
    asked, key = experiment.quantization, "quantization.value_format"
    stored = {group.kind for group in all_layers(experiment) if group.elements_per_token}
    if stored == {"mla"} and asked.value_format is not None and asked.value_format != asked.key_format:
        rule = f"must be null for {experiment.model.name}: its latents are stored in the key format, once for both"
        yield Problem(key, rule, asked.value_format, f"{key}=null")


@RECIPE_RULES.rule("quantization.balance_rope", "model.layer_groups")
def balanced_keys_are_those_of_heads(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Balancing needs layers that keep the keys of single heads."""
    kinds = {group.kind for group in experiment.model.layer_groups}
    if experiment.quantization.balance_rope and kinds.isdisjoint(("full", "sliding_window", "chunked")):
        rule = f"must not be true for {experiment.model.name}, which keeps no keys of single heads"
        yield Problem("quantization.balance_rope", rule, True, "quantization.balance_rope=null")


def _named_formats(experiment: ExperimentConfig) -> dict[str, str]:
    """Formats that are named, by the key that names them."""
    asked = experiment.quantization
    names = (experiment.cache.kv_cache_format, asked.key_format, asked.value_format)
    return {key: name for key, name in zip(FORMAT_KEYS, names, strict=True) if name is not None}


def _formats(experiment: ExperimentConfig) -> list[Format]:
    """Formats of keys and of values; empty while a name is wrong, which another rule tells."""
    asked, default = experiment.quantization, experiment.cache.kv_cache_format or experiment.model.dtype
    names = [(asked.key_format or default).lower(), (asked.value_format or default).lower()]
    return [FORMATS[name] for name in names] if all(name in FORMATS for name in names) else []


def _scaled_formats(experiment: ExperimentConfig) -> list[Format]:
    return [item for item in _formats(experiment) if item.scaled]


def _is_float(item: Format) -> bool:
    return item.dtype.is_float()


def _stored_dims(experiment: ExperimentConfig) -> list[int]:
    """Widths along which blocks are laid, without repeats."""
    groups = [group for group in all_layers(experiment) if group.elements_per_token]
    return list(dict.fromkeys(dim for group in groups for dim in (group.head_dim, group.value_dim) if dim))


def _largest_common_block(experiment: ExperimentConfig, at_most: int) -> int:
    dims = _stored_dims(experiment)
    return next(size for size in range(at_most, 0, -1) if all(dim % size == 0 for dim in dims))
