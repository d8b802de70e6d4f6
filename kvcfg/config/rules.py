"""Rules between groups: each a function that yields what is wrong, with the keys it reads stated above it.

The keys matter when one of their values was refused already: a rule that would judge a stand-in stays silent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcfg.config.cache import KVConnectorType
from kvcfg.config.drafts import draft_layers
from kvcfg.errors import Problem, nearest, one_of
from kvcfg.formats import FORMATS, PACKED_MULTIPLE, STORED_SCALES, Format

if TYPE_CHECKING:
    from kvcfg.config.experiment import ExperimentConfig
    from kvcfg.config.model import LayerGroup

Check = Callable[["ExperimentConfig"], Iterator[Problem]]

FORMAT_KEYS = ("cache.kv_cache_format", "quantization.key_format", "quantization.value_format")
DRAFT_KEYS = ("speculative.draft_layer_groups", "speculative.speculative_method", "model.layer_groups")
RECIPE_KEYS = (*FORMAT_KEYS, "quantization.granularity", "quantization.scale_source", "model.dtype")


@dataclass(frozen=True, slots=True)
class Rule:
    """A check and the keys whose values it reads."""

    reads: tuple[str, ...]
    check: Check

    def reads_any(self, keys: Collection[str]) -> bool:
        """Whether one of the keys is read, holds a key that is read, or lies inside one."""
        return any(_overlap(read, key) for read in self.reads for key in keys)


RULES: list[Rule] = []


def problems(experiment: ExperimentConfig, refused: Collection[str] = ()) -> list[Problem]:
    """Everything that is wrong between the groups, by the rules that read none of the `refused` keys."""
    return [item for rule in RULES if not rule.reads_any(refused) for item in rule.check(experiment)]


def _rule(*reads: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        RULES.append(Rule(reads, check))
        return check

    return add


@_rule(*FORMAT_KEYS)
def formats_exist(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Every format that is named is in the table."""
    for key, name in _named_formats(experiment).items():
        if name.lower() not in FORMATS:
            close = nearest(name, list(FORMATS))
            yield Problem(key, one_of(list(FORMATS)), name, f"{key}={close or 'bfloat16'}")


@_rule(*FORMAT_KEYS)
def formats_agree(experiment: ExperimentConfig) -> Iterator[Problem]:
    """`cache.kv_cache_format` and the formats of the recipe say the same where both speak."""
    asked = _named_formats(experiment)
    cache_format = asked.pop("cache.kv_cache_format", None)
    for key, name in asked.items():
        if cache_format is not None and name.lower() != cache_format.lower():
            rule = f"must be null or equal to cache.kv_cache_format={cache_format}, which says it for keys and values"
            yield Problem(key, rule, name, "cache.kv_cache_format=null")


@_rule(*RECIPE_KEYS)
def scaled_formats_have_scales(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A format that needs scales gets them; fp8 may be told that its scale is 1."""
    scaled = _scaled_formats(experiment)
    if experiment.quantization.granularity != "none" or not scaled:
        return
    key, granularity = "quantization.granularity", "tensor" if all(_is_float(item) for item in scaled) else "token_head"
    names = " and ".join(dict.fromkeys(item.name for item in scaled))
    unit = "; tensor stores with a scale of 1, token_head with the best one" if granularity == "tensor" else ""
    yield Problem(key, f"must not be none for {names}, which needs scales{unit}", "none", f"{key}={granularity}")


@_rule(*RECIPE_KEYS, "quantization.scale_dtype")
def scales_have_a_format(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Scales are asked for only where a format is scaled."""
    asked, formats = experiment.quantization, _formats(experiment)
    if not formats or any(item.scaled for item in formats):
        return
    names = " and ".join(dict.fromkeys(item.name for item in formats))
    rule = f"must be null for {names}, which holds numbers as they are and has no scales"
    for name in ("granularity", "scale_source", "scale_dtype"):
        value = getattr(asked, name)
        if value not in (None, "none"):
            yield Problem(f"quantization.{name}", rule, value, f"quantization.{name}=null")


@_rule("quantization.granularity", "quantization.scale_source")
def dynamic_scales_are_fine(experiment: ExperimentConfig) -> Iterator[Problem]:
    """One scale for a whole tensor or head cannot follow numbers that are not there yet."""
    asked = experiment.quantization
    if asked.granularity in ("tensor", "head") and asked.scale_source == "dynamic":
        rule = f"must be unit for granularity={asked.granularity}: dynamic scales are per token_head, block or channel"
        yield Problem("quantization.scale_source", rule, "dynamic", "quantization.scale_source=unit")
    if asked.granularity == "channel" and asked.scale_source == "unit":
        rule = "must be dynamic for granularity=channel, whose scales are those of a full page"
        yield Problem("quantization.scale_source", rule, "unit", "quantization.scale_source=dynamic")


@_rule(*RECIPE_KEYS, "quantization.scale_dtype", *DRAFT_KEYS)
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


@_rule("quantization.granularity", "quantization.quantization_granularity", *DRAFT_KEYS)
def blocks_have_a_size(experiment: ExperimentConfig) -> Iterator[Problem]:
    """granularity=block and its size come together."""
    asked, key = experiment.quantization, "quantization.quantization_granularity"
    if asked.granularity == "block" and asked.quantization_granularity is None:
        size = _largest_common_block(experiment, 32)
        yield Problem(key, "must be given for granularity=block: numbers that share a scale", None, f"{key}={size}")
    if asked.granularity != "block" and asked.quantization_granularity is not None:
        rule = f"must be null unless quantization.granularity=block (it is {asked.granularity or 'null'})"
        yield Problem(key, rule, asked.quantization_granularity, f"{key}=null")


@_rule("quantization.granularity", "quantization.quantization_granularity", *DRAFT_KEYS)
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


@_rule(*FORMAT_KEYS, *DRAFT_KEYS)
def latents_have_one_format(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A model of latents alone stores no values, so a format for them would do nothing."""
    asked, key = experiment.quantization, "quantization.value_format"
    stored = {group.kind for group in _all_layers(experiment) if group.elements_per_token}
    if stored == {"mla"} and asked.value_format is not None and asked.value_format != asked.key_format:
        rule = f"must be null for {experiment.model.name}: its latents are stored in the key format, once for both"
        yield Problem(key, rule, asked.value_format, f"{key}=null")


@_rule("quantization.balance_rope", "model.layer_groups")
def balanced_keys_are_those_of_heads(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Balancing needs layers that keep the keys of single heads."""
    kinds = {group.kind for group in experiment.model.layer_groups}
    if experiment.quantization.balance_rope and not any(map(_has_heads, kinds)):
        rule = f"must not be true for {experiment.model.name}, which keeps no keys of single heads"
        yield Problem("quantization.balance_rope", rule, True, "quantization.balance_rope=null")


@_rule("devices", "model.layer_groups", "model.num_q_heads")
def heads_split_over_devices(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Tensor parallelism gives every device the same number of heads, or copies of one."""
    devices, tp = experiment.devices, experiment.devices.tensor_parallel_degree
    if _splits(experiment, tp):
        return
    heads = dict.fromkeys(group.n_kv_heads for group in experiment.model.layer_groups if _has_heads(group.kind))
    kv_heads = " or ".join(str(count) for count in heads)
    rule = (
        f"is tensor parallel over {tp} (count / data_parallel_degree), which must divide the "
        f"{experiment.model.num_q_heads} query heads and {kv_heads or 'no'} KV heads of {experiment.model.name}"
    )
    if devices.allow_kv_head_replication and heads:
        rule += " (or be a multiple of the KV heads)"
    yield Problem("devices.count", rule, devices.count, _splitting_devices(experiment, tp))


@_rule(*DRAFT_KEYS, "devices", "model.num_q_heads")
def drafters_split_over_devices(experiment: ExperimentConfig) -> Iterator[Problem]:
    """The heads of a drafter split where those of the model do."""
    tp = experiment.devices.tensor_parallel_degree
    if not _splits(experiment, tp) or _splits(experiment, tp, drafts=True):
        return
    heads = " and ".join(str(group.n_kv_heads) for group in draft_layers(experiment).groups)
    rule = f"has {heads} KV heads, which tensor parallel {tp} does not split into equal shares"
    yield Problem("speculative.draft_layer_groups", rule, ..., _splitting_devices(experiment, tp, drafts=True))


@_rule(*DRAFT_KEYS)
def drafters_are_known(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A drafter that is to be like the model's layers needs some that keep tokens."""
    method, key = experiment.speculative.speculative_method, "speculative.draft_layer_groups"
    if method is not None and not draft_layers(experiment).groups:
        heads = experiment.devices.tensor_parallel_degree
        fix = f"{key}=[{{kind:full,num_layers:1,n_kv_heads:{heads},head_dim:128}}]"
        rule = f"must be told: no layer of {experiment.model.name} keeps tokens, so none says what {method} stores"
        yield Problem(key, rule, ..., fix)


@_rule("cache.kv_connector", "model.layer_groups")
def tiers_find_pages_again(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Pages in a tier are found by their prefix, from which a linear state cannot go on."""
    connector = experiment.cache.kv_connector
    states = any(group.kind == "linear" for group in experiment.model.layer_groups)
    if states and connector not in (None, KVConnectorType.null):
        rule = f"must be null for {experiment.model.name}: the state of a linear layer cannot resume from a page"
        yield Problem("cache.kv_connector", rule, connector, "cache.kv_connector=null")


@_rule("workload.max_seq_len", "model.max_seq_len")
def sequences_fit_the_model(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Sequences are no longer than the context of the model."""
    asked, limit = experiment.workload.max_seq_len, experiment.model.max_seq_len
    if asked is not None and asked > limit:
        rule = f"must be at most {limit}, the context of {experiment.model.name} in tokens (model.max_seq_len)"
        yield Problem("workload.max_seq_len", rule, asked, f"workload.max_seq_len={limit}")


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


def _all_layers(experiment: ExperimentConfig) -> tuple[LayerGroup, ...]:
    """The layers of the model and of its drafter."""
    return (*experiment.model.layer_groups, *draft_layers(experiment).groups)


def _has_heads(kind: str) -> bool:
    return kind in ("full", "sliding_window", "chunked")


def _splits(experiment: ExperimentConfig, tp: int, copies: bool | None = None, drafts: bool = False) -> bool:
    copies = experiment.devices.allow_kv_head_replication if copies is None else copies
    layers = _all_layers(experiment) if drafts else experiment.model.layer_groups
    groups = [group for group in layers if _has_heads(group.kind)]
    return experiment.model.num_q_heads % tp == 0 and all(
        group.n_kv_heads % tp == 0 or (copies and tp % group.n_kv_heads == 0) for group in groups
    )


def _splitting_devices(experiment: ExperimentConfig, tp: int, drafts: bool = False) -> str:
    """An override under which heads split: copies of them if those help, else fewer devices."""
    if not experiment.devices.allow_kv_head_replication and _splits(experiment, tp, copies=True, drafts=drafts):
        return "devices.allow_kv_head_replication=true"
    fitting = next(degree for degree in range(tp, 0, -1) if _splits(experiment, degree, drafts=drafts))
    return f"devices.count={fitting * experiment.devices.data_parallel_degree}"


def _stored_dims(experiment: ExperimentConfig) -> list[int]:
    """Widths along which blocks are laid, without repeats."""
    groups = [group for group in _all_layers(experiment) if group.elements_per_token]
    return list(dict.fromkeys(dim for group in groups for dim in (group.head_dim, group.value_dim) if dim))


def _largest_common_block(experiment: ExperimentConfig, at_most: int) -> int:
    dims = _stored_dims(experiment)
    return next(size for size in range(at_most, 0, -1) if all(dim % size == 0 for dim in dims))


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
