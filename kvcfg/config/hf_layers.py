"""From the numbers of a config.json to layer groups: which layer keeps what.

Checkpoints older than `layer_types` only say how often a full layer comes, or leave even that to the code of
their architecture, whose defaults are in `hf_architectures`. Whatever else keeps something per token or per
sequence is refused by name: a wrong number would look just like a right one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvcfg.config.hf_architectures import (
    DEFAULTS,
    FULL_EVERY,
    FULL_EVERY_KEYS,
    GATED_DELTA_NET,
    MUST_STATE,
    NOT_UNDERSTOOD,
)
from kvcfg.config.model import LayerGroup
from kvcfg.errors import ConfigError, Problem

Numbers = Mapping[str, Any]

NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")

_KINDS = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding_window",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
}


def fill_defaults(config: Numbers) -> Numbers:
    """The same numbers with those added that the code of this architecture supplies."""
    return {**DEFAULTS.get(str(config.get("model_type")), {}), **config}


def read_layer_groups(config: Numbers, compute_bytes: int) -> tuple[LayerGroup, ...]:
    """Layer groups in order of their first layer.

    Args:
        config: the language model's part of a config.json, after `fill_defaults`.
        compute_bytes: bytes of one number in the compute dtype, in which linear layers keep their inputs.

    Raises:
        ConfigError: if a layer keeps something that kvcfg does not know how to count.
    """
    _check_understood(config)
    members: dict[LayerGroup, list[int]] = {}
    for index, layer in enumerate(_layers(config, compute_bytes)):
        members.setdefault(layer, []).append(index)
    if len(members) == 1:
        return tuple(layer.model_copy(update={"num_layers": len(at)}) for layer, at in members.items())
    return tuple(layer.model_copy(update={"num_layers": len(at), "layers": tuple(at)}) for layer, at in members.items())


def need(config: Numbers, *names: str) -> int:
    """The first of these numbers that is stated.

    Raises:
        ConfigError: if none is.
    """
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise unknown(f"config.json does not state {' or '.join(names)}")


def unknown(what: str) -> ConfigError:
    """The error for an architecture that cannot be read."""
    fix = "layer_groups=[{kind:full,num_layers:32,n_kv_heads:8,head_dim:128}]"
    return ConfigError(Problem("layer_groups", f"cannot be read: {what}; state the groups", None, fix))


def _check_understood(config: Numbers) -> None:
    for key, value in config.items():
        for pattern, what in NOT_UNDERSTOOD:
            if value not in (None, False, 0, [], {}) and re.fullmatch(pattern, key):
                raise unknown(f"{key} of {config.get('model_type')} means {what}")


def _layers(config: Numbers, compute_bytes: int) -> Iterator[LayerGroup]:
    types = _layer_types(config)
    first_shared = len(types) - int(config.get("num_kv_shared_layers") or 0)
    for index, layer_type in enumerate(types):
        if layer_type not in _KINDS:
            raise unknown(f"layers of type {layer_type} of {config.get('model_type')} are not understood")
        numbers = {**config, **_own_numbers(config, index, layer_type)}
        if index >= first_shared:
            yield LayerGroup(kind="shared", num_layers=1, n_kv_heads=_kv_heads(numbers), head_dim=_head_dim(numbers))
        else:
            yield _layer(_KINDS[layer_type], numbers, compute_bytes)


def _layer(kind: str, config: Numbers, compute_bytes: int) -> LayerGroup:
    if kind == "linear":
        return _linear_layer(config, compute_bytes)
    if config.get("kv_lora_rank"):
        if kind != "full":
            raise unknown(f"{kind} layers with a latent are not understood")
        width = need(config, "kv_lora_rank") + need(config, "qk_rope_head_dim")
        return LayerGroup(kind="mla", num_layers=1, n_kv_heads=1, head_dim=width)
    window = {"sliding_window": "sliding_window", "chunked": "attention_chunk_size"}.get(kind)
    head_dim = _head_dim(config)
    value_head_dim = config.get("v_head_dim") or head_dim
    return LayerGroup.model_validate(
        {
            "kind": kind,
            "num_layers": 1,
            "n_kv_heads": _kv_heads(config),
            "head_dim": head_dim,
            "value_head_dim": None if value_head_dim == head_dim else value_head_dim,
            "window": None if window is None else need(config, window),
        }
    )


def _linear_layer(config: Numbers, compute_bytes: int) -> LayerGroup:
    """A gated delta net: the last inputs of a convolution in the compute dtype, and a float32 matrix per head."""
    if config.get("model_type") not in GATED_DELTA_NET:
        raise unknown(f"the state of linear layers of {config.get('model_type')} is not understood")
    key_heads, key_dim = need(config, "linear_num_key_heads"), need(config, "linear_key_head_dim")
    heads, value_dim = need(config, "linear_num_value_heads"), need(config, "linear_value_head_dim")
    convolution = (2 * key_heads * key_dim + heads * value_dim) * need(config, "linear_conv_kernel_dim")
    state_bytes = convolution * compute_bytes + heads * key_dim * value_dim * 4
    return LayerGroup(kind="linear", num_layers=1, n_kv_heads=heads, head_dim=key_dim, state_bytes=state_bytes)


def _layer_types(config: Numbers) -> list[str]:
    num_layers = need(config, *NUM_LAYERS)
    stated = config.get("layer_types")
    if stated:
        if len(stated) != num_layers:
            raise unknown(f"layer_types names {len(stated)} layers of {num_layers}")
        return list(stated)
    _check_stated("layer_types", config)
    other = _other_than_full(config)
    if other is None:
        return ["full_attention"] * num_layers
    if config.get("no_rope_layers"):
        if other != "chunked_attention":
            raise unknown(f"no_rope_layers beside windows of {config.get('model_type')} are not understood")
        return [other if rotates else "full_attention" for rotates in config["no_rope_layers"]]
    if config.get("use_sliding_window"):
        first = int(config.get("max_window_layers") or 0)
        return [other if index >= first else "full_attention" for index in range(num_layers)]
    every = _full_every(config)
    return [other if every is None or (index + 1) % every else "full_attention" for index in range(num_layers)]


def _other_than_full(config: Numbers) -> str | None:
    """The type of the layers that are not full, where only a pattern is stated; None if all are."""
    if config.get("model_type") in GATED_DELTA_NET:
        return "linear_attention"
    if config.get("attention_chunk_size"):
        return "chunked_attention"
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        return "sliding_attention"
    return None


def _full_every(config: Numbers) -> int | None:
    for key in FULL_EVERY_KEYS:
        value = config.get(key)
        if isinstance(value, int):
            return value
        if isinstance(value, str):  # "LLLG": three local layers, then a global one
            return len(value)
    return FULL_EVERY.get(str(config.get("model_type")))


def _own_numbers(config: Numbers, index: int, layer_type: str) -> Numbers:
    """What one layer states differently: per layer by number, or for all global layers of a Gemma 4."""
    per_layer = config.get("per_layer_config")
    if per_layer:
        return {key: value for at, own in per_layer.items() if int(at) == index for key, value in own.items()}
    if "global_head_dim" not in config or layer_type != "full_attention":
        return {}
    heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    return {"head_dim": config["global_head_dim"], **({} if heads is None else {"num_key_value_heads": heads})}


def _check_stated(key: str, config: Numbers) -> None:
    if config.get(key) is None and config.get("model_type") in MUST_STATE[key]:
        raise unknown(f"config.json of {config['model_type']} does not state {key}")


def _kv_heads(config: Numbers) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    attention = config.get("attn_config") or {}
    if attention.get("kv_n_heads"):
        return need(attention, "kv_n_heads")
    _check_stated("num_key_value_heads", config)
    return need(config, "num_key_value_heads", "num_kv_heads", *QUERY_HEADS)


def _head_dim(config: Numbers) -> int:
    for key in ("head_dim", "kv_channels"):
        if config.get(key):
            return need(config, key)
    _check_stated("head_dim", config)
    hidden, heads = need(config, *HIDDEN_SIZE), need(config, *QUERY_HEADS)
    if hidden % heads:
        raise unknown(f"head_dim is not stated and {hidden} does not divide by {heads} heads")
    return hidden // heads
