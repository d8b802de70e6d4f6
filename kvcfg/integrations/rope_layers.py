"""Where a model makes its queries and keys, family by family, and how their channels are scaled there.

A score is a sum over channels of query times key, and RoPE turns pairs of channels: a factor on both channels
of a pair of the keys, undone in the queries, leaves the model's function as it is. The factor belongs in the last
linear step before RoPE: the rows of a projection and its bias, or the weight of the norm after it.

    pairs         channels that turn together
    halves        i and i + r/2, of the first r channels      Llama and most others
    interleaved   2i and 2i + 1, of the first r channels      Cohere, GLM, Helium, Ernie
    beyond r      none: each channel may have a factor of its own
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvcfg.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Family:
    """What the code of an architecture decides and its weights do not show.

    Attributes:
        pairs: how RoPE pairs channels (the table at the top of this file).
        norm_offset: what the norms of queries and keys add to their weight before they multiply by it.
        gated: whether every query head is followed by a gate of the same width in the rows of `q_proj`.
    """

    pairs: Literal["halves", "interleaved"] = "halves"
    norm_offset: float = 0.0
    gated: bool = False


# Keyed by model_type. A family belongs here once a test has seen its function unchanged by unequal factors.
# fmt: off
FAMILIES: dict[str, Family] = {
    **dict.fromkeys((
        "apertus", "arcee", "cwm", "dots1", "exaone4", "flex_olmo", "gemma", "gemma2", "gemma4_text", "glm4_moe",
        "gpt_neox", "gpt_oss", "granite", "granitemoe", "llama", "minimax_m2", "ministral", "ministral3", "mistral",
        "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
        "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma",
    ), Family()),
    **dict.fromkeys((
        "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium",
    ), Family("interleaved")),
    **dict.fromkeys(("gemma3_text",), Family(norm_offset=1.0)),
    **dict.fromkeys((
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    ), Family(norm_offset=1.0, gated=True)),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm between projection and RoPE.

    Attributes:
        weight: `[n_heads, head_dim]`, a view; one head where all share it.
        bias: the same, or None.
        offset: what is added to `weight` before it multiplies.
        spans_heads: whether one mean square is taken over all heads, and not head by head.
    """

    weight: Tensor
    bias: Tensor | None
    offset: float
    spans_heads: bool


@dataclass(frozen=True, slots=True)
class Side:
    """What makes the queries, or the keys, of one layer.

    Attributes:
        rows: `[n_heads, head_dim, hidden_size]`, a view of the projection's weight.
        bias: `[n_heads, head_dim]`, a view of its bias, or None.
        norm: the norm after it, or None.
    """

    rows: Tensor
    bias: Tensor | None
    norm: Norm | None

    @property
    def scaled_heads(self) -> int:
        """Heads that can have factors of their own."""
        return len(self.rows if self.norm is None else self.norm.weight)

    @property
    def dtype(self) -> torch.dtype:
        """What the numbers that take the factor are stored in."""
        return (self.rows if self.norm is None else self.norm.weight).dtype

    def energy(self) -> Tensor:
        """Mean square `[n_heads, head_dim]` of every channel, float64, for hidden numbers of mean square 1."""
        energy = self.rows.double().square().sum(-1)
        if self.bias is not None:
            energy = energy + self.bias.double().square()
        if self.norm is None:
            return energy
        spanned = energy.mean((0, 1) if self.norm.spans_heads else 1, keepdim=True)
        gain = self.norm.weight.double() + self.norm.offset
        shift = 0.0 if self.norm.bias is None else self.norm.bias.double().square()
        return energy / spanned.clamp(min=torch.finfo(torch.float64).tiny) * gain.square() + shift

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply channels by `factors` `[scaled_heads, head_dim]`, in place."""
        if self.norm is None:
            _multiply(self.rows, factors.unsqueeze(-1))
            _multiply(self.bias, factors)
        else:
            _multiply(self.norm.weight, factors, self.norm.offset)
            _multiply(self.norm.bias, factors)


@dataclass(frozen=True, slots=True)
class RopeLayer:
    """One attention layer: its queries, its keys, and which channels turn together.

    Attributes:
        queries, keys: what makes them; query heads that read the same KV head are neighbours.
        pair_of: `[head_dim]` int64, the pair that a channel belongs to; pairs are counted from the one that
            turns fastest, and channels that do not turn are pairs of their own after them.
        num_pairs: RoPE pairs, channels that do not turn left out.
    """

    queries: Side
    keys: Side
    pair_of: Tensor
    num_pairs: int

    def scale_keys(self, factors: Tensor) -> None:
        """Multiply keys by `factors` `[keys.scaled_heads, head_dim]` and divide the queries that read them."""
        self.keys.scale(factors)
        self.queries.scale(1 / factors.repeat_interleave(self.queries.scaled_heads // len(factors), 0))


def rope_layers(model: Any) -> list[RopeLayer]:
    """The attention layers of a transformers model, as views of its weights.

    Raises:
        ShapeError: if the model is of no family in `FAMILIES`, or its layers are not as that family's are.
    """
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ShapeError(f"it is not known how {config.model_type} models rotate their keys")
    if getattr(config, "clip_qkv", None) is not None:
        raise ShapeError(f"clip_qkv={config.clip_qkv} cuts queries and keys between projection and RoPE")
    decoder = model.get_decoder()
    rotary_dims = {2 * len(buffer) for name, buffer in decoder.named_buffers() if name.endswith("inv_freq")}
    layers = [_rope_layer(module, config, family, rotary_dims) for module in _attentions(decoder)]
    if not layers or not rotary_dims:
        raise ShapeError(f"this {config.model_type} model has no attention with RoPE")
    return layers


def _attentions(decoder: nn.Module) -> Iterator[nn.Module]:
    names = ("q_proj", "qkv_proj", "query_key_value")
    return (module for module in decoder.modules() if any(hasattr(module, name) for name in names))


def _rope_layer(attention: Any, config: Any, family: Family, rotary_dims: set[int]) -> RopeLayer:
    head_dim = getattr(attention, "head_dim", None) or attention.head_size
    n_heads = config.num_attention_heads
    if hasattr(attention, "query_key_value"):
        queries, keys = (_rows(attention.query_key_value, (n_heads, 3, head_dim), (slice(None), at)) for at in (0, 1))
    elif hasattr(attention, "qkv_proj"):
        split = n_heads, n_heads + config.num_key_value_heads
        queries, keys = (
            _rows(attention.qkv_proj, (-1, head_dim), (heads,)) for heads in (slice(split[0]), slice(*split))
        )
    elif hasattr(attention, "k_proj"):
        gates = (slice(None, None, 2),) if family.gated else ()
        queries, keys = _rows(attention.q_proj, (-1, head_dim), gates), _rows(attention.k_proj, (-1, head_dim))
    else:
        raise ShapeError(f"layers of this {config.model_type} model read the keys of other layers")
    norms = [_norm(attention, side, head_dim, family.norm_offset) for side in ("q", "k")]
    rotary_dim = max((dim for dim in rotary_dims if dim <= head_dim), default=0)
    pair_of = _pairs(family, head_dim, rotary_dim).to(keys[0].device)
    return RopeLayer(Side(*queries, norms[0]), Side(*keys, norms[1]), pair_of, rotary_dim // 2)


def _rows(projection: nn.Module, shape: tuple[int, ...], part: tuple[Any, ...] = ()) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection as heads; `part` picks those that count."""
    if not isinstance(projection, nn.Linear):
        raise ShapeError(f"a projection is a {type(projection).__name__}, not an nn.Linear, and cannot be scaled")
    weight: Tensor = projection.weight.detach()
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ShapeError(f"projections are stored as {weight.dtype}, which cannot be scaled in place")
    bias: Tensor | None = projection.bias
    heads = None if bias is None else bias.detach().unflatten(0, shape)[part]
    return weight.unflatten(0, shape)[part], heads


def _norm(attention: nn.Module, side: str, head_dim: int, offset: float) -> Norm | None:
    norm = getattr(attention, f"{side}_norm", None) or getattr(attention, f"{side}_layernorm", None)
    if norm is None:
        return None
    if not isinstance(getattr(norm, "weight", None), Tensor):
        raise ShapeError(f"{type(norm).__name__} has no weight that could be scaled")
    weight, bias = norm.weight.detach(), getattr(norm, "bias", None)
    spans_heads = weight.ndim == 1 and len(weight) > head_dim
    return Norm(
        weight.view(-1, head_dim), None if bias is None else bias.detach().view(-1, head_dim), offset, spans_heads
    )


def _pairs(family: Family, head_dim: int, rotary_dim: int) -> Tensor:
    pairs = torch.arange(rotary_dim // 2)
    turning = pairs.repeat(2) if family.pairs == "halves" else pairs.repeat_interleave(2)
    return torch.cat([turning, torch.arange(rotary_dim // 2, head_dim - rotary_dim // 2)])


def _multiply(numbers: Tensor | None, factors: Tensor, offset: float = 0.0) -> None:
    if numbers is not None:
        numbers.copy_((numbers.double() + offset) * factors - offset)
