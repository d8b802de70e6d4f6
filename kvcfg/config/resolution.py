"""From what was asked to what will be built: every null gets a value, and every value a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcfg.config.devices import DevicesConfig, detect
from kvcfg.config.drafts import DraftLayers, draft_layers
from kvcfg.config.model import LayerGroup
from kvcfg.config.recipes import StoredLayers, balancing_gains, drafted_recipe, resolve_recipe, stored_layers
from kvcfg.errors import ConfigError
from kvcfg.formats import Recipe
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
    stored = stored_layers(experiment)
    groups = [
        *(_group_params(experiment, "target", *layers, devices) for layers in stored if layers.group.kind != "shared"),
        *(_group_params(experiment, "draft", group, drafted_recipe(group, recipe), devices) for group in drafts.groups),
    ]
    choices = (
        *_recipe_choices(experiment, recipe),
        *_layer_choices(recipe, stored),
        *_device_choices(experiment, devices, groups),
        *_other_choices(experiment, max_seq_len),
        *_draft_choices(experiment, drafts),
    )
    return Resolution(MultiKVCacheParams.from_params(*groups), devices, max_seq_len, choices)


def _group_params(
    experiment: ExperimentConfig, role: CacheRole, group: LayerGroup, recipe: Recipe, devices: DevicesConfig
) -> KVCacheParams:
    cache, speculative = experiment.cache, experiment.speculative
    connector = cache.kv_connector_config
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


def _layer_choices(recipe: Recipe, stored: list[StoredLayers]) -> list[Choice]:
    """Layers that are not stored as the others are, though nothing was said of them."""
    choices = []
    kinds = {layers.group.kind for layers in stored if layers.group.window is not None}
    if kinds and recipe.open_page is not None:
        why = "a window gives its pages up soon after they are full"
        choices.append(Choice("format of windowed layers", recipe.format_name, recipe.open_page.format_name, why))
    if recipe.transform != "none" and any(layers.group.kind == "mla" for layers in stored):
        why = "the RoPE part of a latent must not be mixed with the rest"
        choices.append(Choice("transform of latents", recipe.transform, "none", why))
    return choices


def _has_states(experiment: ExperimentConfig) -> bool:
    """Whether a layer keeps a state instead of tokens, and so cannot go on from a page of a prefix."""
    return any(group.kind == "linear" for group in experiment.model.layer_groups)


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
        why = "pages stored as a whole need no more" if recipe.closes else "the default"
        choices.append(Choice("quantization.scale_dtype", None, recipe.scale_dtype.name, why))
    if recipe.transform != "none" and asked.transform is None:
        why = "below 8 bits keys less the mean of their page lose least"
        choices.append(Choice("quantization.transform", None, recipe.transform, why))
    if recipe.sink_tokens and asked.sink_tokens is None:
        why = "the first token of a sequence is unlike the others and is read most"
        choices.append(Choice("quantization.sink_tokens", None, recipe.sink_tokens, why))
    if recipe.open_page is not None and asked.open_page_format is None:
        why = "the newest tokens are read most, and a page is stored as a whole"
        choices.append(Choice("quantization.open_page_format", None, recipe.open_page.format_name, why))
    if asked.balance_rope is None:
        choices.append(Choice("quantization.balance_rope", None, *balancing_gains(experiment.model, recipe)))
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
