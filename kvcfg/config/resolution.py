"""From what was asked to what will be built: every null gets a value, and every value a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcfg.config.devices import DevicesConfig, detect
from kvcfg.config.drafts import DraftLayers, draft_layers
from kvcfg.config.model import LayerGroup
from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError
from kvcfg.formats import FORMATS, STORED_SCALES, Format, Recipe
from kvcfg.param_checks import CacheRole
from kvcfg.params import KVCacheParams, KVCacheQuantizationConfig, MultiKVCacheParams

if TYPE_CHECKING:
    from kvcfg.config.experiment import ExperimentConfig


@dataclass(frozen=True, slots=True)
class Choice:
    """One value that was left open or that reads differently once resolved.

    Attributes:
        key: the override that would set it.
        requested: what was asked for; None stands for null.
        resolved: what it became.
        why: the reason, in a few words.
    """

    key: str
    requested: Any
    resolved: Any
    why: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """Parameters with nothing left to guess, and how they came about."""

    params: MultiKVCacheParams
    devices: DevicesConfig
    max_seq_len: int
    choices: tuple[Choice, ...]


def resolve(experiment: ExperimentConfig) -> Resolution:
    """Resolve every open value of a validated experiment; reads this machine only for `devices=auto` and `cpu`."""
    try:
        devices = detect(experiment.devices)
    except ConfigError as error:
        raise error.under("devices") from None
    recipe = resolve_recipe(experiment)
    max_seq_len = experiment.workload.max_seq_len or experiment.model.max_seq_len
    drafts = draft_layers(experiment)
    layers: list[tuple[CacheRole, LayerGroup]] = [
        *(("target", group) for group in experiment.model.layer_groups if group.kind != "shared"),
        *(("draft", group) for group in drafts.groups),
    ]
    groups = [_group_params(experiment, role, group, recipe, devices) for role, group in layers]
    choices = (
        *_recipe_choices(experiment, recipe),
        *_window_choices(experiment, recipe),
        *_device_choices(experiment, devices, groups),
        *_other_choices(experiment, max_seq_len),
        *_draft_choices(experiment, drafts),
    )
    return Resolution(MultiKVCacheParams.from_params(*groups), devices, max_seq_len, choices)


def resolve_recipe(experiment: ExperimentConfig) -> Recipe:
    """The recipe that the `cache` and `quantization` groups ask for together."""
    asked = experiment.quantization
    default = experiment.cache.kv_cache_format or experiment.model.dtype
    key_format = FORMATS[(asked.key_format or default).lower()]
    value_format = FORMATS[(asked.value_format or default).lower()]
    granularity = asked.granularity or ("token_head" if _any_scaled(key_format, value_format) else "none")
    return Recipe(
        key_format,
        value_format,
        granularity,
        asked.scale_source or ("dynamic" if granularity in STORED_SCALES else "unit"),
        DType[asked.scale_dtype or "float32"],
        asked.quantization_granularity,
    )


def balances_rope(experiment: ExperimentConfig) -> bool:
    """Whether RoPE pairs are balanced when the experiment's model is loaded."""
    asked = experiment.quantization.balance_rope
    return _balancing_gains(experiment, resolve_recipe(experiment))[0] if asked is None else asked


def _balancing_gains(experiment: ExperimentConfig, recipe: Recipe) -> tuple[bool, str]:
    """Whether balanced keys are stored with less loss than others, and why."""
    if not any(group.kind in ("full", "sliding_window", "chunked") for group in experiment.model.layer_groups):
        return False, f"{experiment.model.name} keeps no keys of single heads"
    if recipe.key_format.bits >= 16:
        return False, f"{recipe.key_format.name} holds every channel as it is"
    if recipe.scale_source == "unit":
        return False, "a scale of 1 is the same for all keys"
    return True, "channels that share a scale lose least when none stands out"


def _group_params(
    experiment: ExperimentConfig, role: CacheRole, group: LayerGroup, recipe: Recipe, devices: DevicesConfig
) -> KVCacheParams:
    cache, speculative = experiment.cache, experiment.speculative
    connector = cache.kv_connector_config
    if group.window is not None and recipe.open_page is not None:
        recipe = recipe.open_page
    return KVCacheParams(
        dtype=recipe.key_format.dtype,
        n_kv_heads=group.n_kv_heads,
        head_dim=group.head_dim,
        num_layers=group.num_layers,
        devices=devices.refs(),
        enable_prefix_caching=cache.enable_prefix_caching and not _has_states(experiment),
        kv_connector=cache.kv_connector,
        kv_connector_config=connector,
        host_kvcache_swap_space_gb=connector.host_kvcache_swap_space_gb if connector else None,
        page_size=cache.kv_cache_page_size,
        is_mla=group.kind == "mla",
        num_q_heads=experiment.model.num_q_heads,
        data_parallel_degree=devices.data_parallel_degree,
        kvcache_quant_config=KVCacheQuantizationConfig(
            scale_dtype=recipe.scale_dtype, quantization_granularity=recipe.block_size or group.head_dim
        )
        if recipe.is_scaled
        else None,
        speculative_method=speculative.speculative_method,
        num_draft_tokens=speculative.num_draft_tokens,
        allow_kv_head_replication=devices.allow_kv_head_replication,
        kind=group.kind,
        window=group.window,
        value_head_dim=group.value_head_dim,
        state_bytes=group.state_bytes or 0,
        role=role,
        recipe=recipe,
    )


def _window_choices(experiment: ExperimentConfig, recipe: Recipe) -> list[Choice]:
    """A window gives up a page soon after it is full, so there a page stays as it was while it was filled."""
    if recipe.open_page is None or all(group.window is None for group in experiment.model.layer_groups):
        return []
    why = "a window gives its pages up soon after they are full"
    return [Choice("format of windowed layers", recipe.format_name, recipe.open_page.format_name, why)]


def _has_states(experiment: ExperimentConfig) -> bool:
    """Whether a layer keeps a state instead of tokens, and so cannot go on from a page of a prefix."""
    return any(group.kind == "linear" for group in experiment.model.layer_groups)


def _any_scaled(*formats: Format) -> bool:
    return any(item.scaled for item in formats)


def _recipe_choices(experiment: ExperimentConfig, recipe: Recipe) -> list[Choice]:
    cache, asked, model = experiment.cache, experiment.quantization, experiment.model
    choices = []
    if cache.kv_cache_format is None:
        by_recipe = asked.key_format or asked.value_format
        why = "the recipe says so" if by_recipe else f"{model.name} computes in {model.dtype}"
        choices.append(Choice("cache.kv_cache_format", None, recipe.format_name, why))
    if asked.granularity is None:
        why = (
            f"{_scaled_names(recipe)} needs scales; per token and head loses least"
            if recipe.granularity == "token_head"
            else f"{recipe.key_format.name} holds the numbers as they are"
        )
        choices.append(Choice("quantization.granularity", None, recipe.granularity, why))
    if recipe.granularity != "none" and asked.scale_source is None:
        why = "scales follow the numbers" if recipe.scale_source == "dynamic" else "nothing was calibrated"
        choices.append(Choice("quantization.scale_source", None, recipe.scale_source, why))
    if recipe.scale_source == "dynamic" and asked.scale_dtype is None:
        choices.append(Choice("quantization.scale_dtype", None, recipe.scale_dtype.name, "the default"))
    if asked.balance_rope is None:
        choices.append(Choice("quantization.balance_rope", None, *_balancing_gains(experiment, recipe)))
    return choices


def _scaled_names(recipe: Recipe) -> str:
    return "/".join(dict.fromkeys(item.name for item in (recipe.key_format, recipe.value_format) if item.scaled))


def _device_choices(experiment: ExperimentConfig, devices: DevicesConfig, groups: list[KVCacheParams]) -> list[Choice]:
    asked = experiment.devices
    choices = []
    if asked.kind == "auto":
        choices.append(Choice("devices", "auto", f"{devices.name} x {devices.count}", "what this machine has"))
    if asked.memory_gib is None and devices.memory_gib is not None:
        resolved = f"{devices.memory_gib:.2f}"
        choices.append(Choice("devices.memory_gib", None, resolved, "free on this machine now"))
    tp = devices.tensor_parallel_degree
    for params in groups:
        if params.kind in ("full", "sliding_window", "chunked") and params.n_kv_heads < tp:
            why = f"{params.n_kv_heads} KV heads on {tp} devices: each head is kept {tp // params.n_kv_heads} times"
            choices.append(Choice("n_kv_heads per device", params.n_kv_heads, params.n_kv_heads_per_device, why))
        if params.is_mla and tp > 1:
            choices.append(Choice("latent per device", 1, 1, f"one latent for all heads: kept on all {tp} devices"))
    return list(dict.fromkeys(choices))


def _other_choices(experiment: ExperimentConfig, max_seq_len: int) -> list[Choice]:
    choices = []
    if experiment.workload.max_seq_len is None:
        choices.append(Choice("workload.max_seq_len", None, max_seq_len, f"the context of {experiment.model.name}"))
    if experiment.cache.enable_prefix_caching and _has_states(experiment):
        why = "the state of a linear layer cannot resume from a page"
        choices.append(Choice("cache.enable_prefix_caching", True, False, why))
    return choices


def _draft_choices(experiment: ExperimentConfig, drafts: DraftLayers) -> list[Choice]:
    choices = []
    speculative = experiment.speculative
    if speculative.speculative_method is not None and speculative.num_speculative_tokens is None:
        why = f"the default of {speculative.speculative_method}"
        choices.append(Choice("speculative.num_speculative_tokens", None, speculative.num_draft_tokens, why))
    if drafts.why is not None:
        layers = [group.model_dump(mode="json") for group in drafts.groups]
        choices.append(Choice("speculative.draft_layer_groups", None, layers, drafts.why))
    return choices
