"""How many parameters a model has and how many bits each takes: from its weight files, else from its dimensions.

A safetensors file starts with the length of its header, 8 bytes little-endian, and the header, JSON: a shape and
a dtype per tensor. Nothing else of the file is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcfg.config.hf_architectures import GATED_DELTA_NET
from kvcfg.config.hf_layers import HIDDEN_SIZE, QUERY_HEADS, Numbers, need
from kvcfg.config.model import LayerGroup

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
LONGEST_HEADER = 100_000_000

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TWO_MATRICES = frozenset(
    {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "opt", "phi", "starcoder2"}
)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What the headers of the weight files say.

    Attributes:
        num_elements: numbers in all tensors, as stored; fewer than parameters where several are packed into one.
        num_bytes: bytes of all tensors.
        dtype: the floating point type that takes most bytes; None if there is none that models compute in.
    """

    num_elements: int
    num_bytes: int
    dtype: str | None


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters in all, and those that one token passes through."""

    total: int
    active: int


def read_stored_weights(folder: Path) -> StoredWeights | None:
    """What the safetensors files of a folder hold; None if one of them is missing or is a pointer to the real file."""
    index = folder / INDEX_NAME
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {SINGLE_NAME}
        tensors = [tensor for name in sorted(names) for tensor in _tensors(folder / name)]
    except (OSError, ValueError, KeyError):
        return None
    bytes_by_dtype: dict[str, int] = {}
    for tensor in tensors:
        start, end = tensor["data_offsets"]
        bytes_by_dtype[tensor["dtype"]] = bytes_by_dtype.get(tensor["dtype"], 0) + end - start
    floats = {dtype: size for dtype, size in bytes_by_dtype.items() if dtype in _DTYPE_NAMES}
    most = max(floats, key=lambda dtype: floats[dtype], default=None)
    return StoredWeights(
        num_elements=sum(math.prod(tensor["shape"]) for tensor in tensors),
        num_bytes=sum(bytes_by_dtype.values()),
        dtype=None if most is None else _DTYPE_NAMES[most],
    )


def estimate_parameters(config: Numbers, groups: tuple[LayerGroup, ...]) -> ParameterCount:
    """Parameters of the language model from its dimensions, within a few percent: norms and biases are left out.

    Raises:
        ConfigError: if a dimension that is needed is not stated.
    """
    hidden, vocab = need(config, *HIDDEN_SIZE), need(config, "vocab_size")
    tables = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    attention = sum(group.num_layers * _attention(config, group) for group in groups)
    total = active = tables + attention + _per_layer_embeddings(config)
    for chosen, stored in _feed_forwards(config, sum(group.num_layers for group in groups)):
        total += stored
        active += chosen
    return ParameterCount(total, active)


def _tensors(file: Path) -> list[dict[str, Any]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, LONGEST_HEADER)))
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _attention(config: Numbers, group: LayerGroup) -> int:
    hidden, heads = need(config, *HIDDEN_SIZE), need(config, *QUERY_HEADS)
    if group.kind == "linear":
        keys = need(config, "linear_num_key_heads") * need(config, "linear_key_head_dim")
        values = need(config, "linear_num_value_heads") * need(config, "linear_value_head_dim")
        return hidden * (2 * keys + 3 * values) + (2 * keys + values) * need(config, "linear_conv_kernel_dim")
    if group.kind == "mla":
        rank, rope = need(config, "kv_lora_rank"), need(config, "qk_rope_head_dim")
        plain, value = need(config, "qk_nope_head_dim"), need(config, "v_head_dim")
        query_rank = config.get("q_lora_rank")
        query_width = heads * (plain + rope)
        query = query_rank * (hidden + query_width) if query_rank else hidden * query_width
        return query + hidden * (rank + rope) + rank * heads * (plain + value) + heads * value * hidden
    queries = hidden * heads * (group.head_dim + group.value_dim)
    if config.get("model_type") in GATED_DELTA_NET:  # their full layers gate what they give out, by one more matrix
        queries += hidden * heads * group.head_dim
    stored = 0 if group.kind == "shared" else hidden * group.n_kv_heads * (group.head_dim + group.value_dim)
    return queries + stored


def _per_layer_embeddings(config: Numbers) -> int:
    width = config.get("hidden_size_per_layer_input") or 0
    if not width:
        return 0
    per_layer = need(config, "vocab_size_per_layer_input") + 3 * need(config, *HIDDEN_SIZE)
    return need(config, "num_hidden_layers") * width * per_layer


def _feed_forwards(config: Numbers, num_layers: int) -> Iterator[tuple[int, int]]:
    """Parameters used by one token, and stored, of the feed-forward part of each layer."""
    hidden = need(config, *HIDDEN_SIZE)
    matrices = 2 if config.get("model_type") in _TWO_MATRICES else 3
    experts = next((config[key] for key in EXPERTS if config.get(key)), 0)
    widths = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim") or 4 * hidden
    for index in range(num_layers):
        width = widths[index] if isinstance(widths, list) else widths
        if not experts or not _has_experts(config, index):
            dense = matrices * hidden * (config.get("intermediate_size_mlp") or width)
            yield dense, dense
            continue
        expert = 3 * hidden * (config.get("moe_intermediate_size") or width)
        always = 3 * hidden * _shared_width(config, width) + hidden * experts
        chosen = need(config, "num_experts_per_tok", "top_k_experts", "moe_top_k")
        yield always + expert * chosen, always + expert * experts


def _has_experts(config: Numbers, index: int) -> bool:
    if config.get("mlp_layer_types"):
        return bool(config["mlp_layer_types"][index] == "sparse")
    step = config.get("interleave_moe_layer_step") or config.get("decoder_sparse_step") or 1
    return (
        index >= (config.get("first_k_dense_replace") or 0)
        and index not in (config.get("mlp_only_layers") or ())
        and (index + 1) % step == 0
    )


def _shared_width(config: Numbers, width: int) -> int:
    """Width of the experts that every token passes through."""
    if config.get("shared_expert_intermediate_size"):
        return need(config, "shared_expert_intermediate_size")
    if config.get("model_type") in ("llama4_text", "gemma4_text", "gemma4_unified_text"):
        return width
    shared: int = (config.get("n_shared_experts") or 0) * (config.get("moe_intermediate_size") or width)
    return shared
