"""Attention of transformers that reads pages where they lie: the implementation `kvcfg`.

    model.set_attn_implementation("kvcfg")        # "sdpa" again: keys and values are gathered, as for any cache

A layer's `update` returns `PagedStates`, which know their pages, and masks are `LazyMask`, which know what they are
made of; models pass both on. Where a layer asks for something else than causal attention, with or without a window or
padding at the start, over pages that kernels read, both are made plain and the attention that the model has by default
computes it.
"""

from __future__ import annotations

import logging
import sys
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcfg.attention import Reach, attend, causal
from kvcfg.cache.paged import PagedKVCache
from kvcfg.cache.storage import KeysValues
from kvcfg.cache.view import LayerView
from kvcfg.integrations.lazy_tensors import LazyTensor
from kvcfg.kernels.cpu.attend import QUERY_TYPES
from kvcfg.kernels.cpu.loader import load_kernel

_log = logging.getLogger("kvcfg")

NAME = "kvcfg"
"""What transformers calls this attention."""


class PagedStates(LazyTensor):
    """Keys or values `[batch_size, n_kv_heads, num_tokens, dim]` of a layer, in its pages until they are touched.

    Attributes:
        pages: what the step's queries may read, until the layer's next tokens are stored.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pages: LayerView, gathered: _Gathered
    ) -> None:
        self.pages = pages
        self._gathered = gathered

    @classmethod
    def pair(cls, cache: PagedKVCache, pages: LayerView, num_tokens: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer.

        Args:
            cache: whose pages they are.
            pages: of the layer.
            num_tokens: what the step's queries may read of each sequence.
            keys: the new keys, for dtype and sizes.
        """
        gathered = _Gathered(cache, pages, keys.dtype)
        batch_size, n_kv_heads, _, head_dim = keys.shape
        kind = (keys.dtype, keys.device, pages, gathered)
        return (
            _Keys((batch_size, n_kv_heads, num_tokens, head_dim), *kind),
            _Values((batch_size, n_kv_heads, num_tokens, pages.value_dim), *kind),
        )


class _Keys(PagedStates):
    def read(self) -> Tensor:
        return self._gathered.states.keys


class _Values(PagedStates):
    def read(self) -> Tensor:
        return self._gathered.states.values


class _Gathered:
    """What a layer's queries may read, gathered once for keys and values."""

    def __init__(self, cache: PagedKVCache, pages: LayerView, dtype: torch.dtype) -> None:
        self._cache, self._pages, self._dtype = cache, pages, dtype

    @cached_property
    def states(self) -> KeysValues:
        return self._cache.read(self._pages, self._dtype)


class LazyMask(LazyTensor):
    """A causal mask `[batch_size, 1, q_length, kv_length]` of one kind of layers, which most layers do not need.

    Attributes:
        window: tokens that a query sees; None = all.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, made_of: dict[str, Any]
    ) -> None:
        self.window: int | None = made_of.get("local_size")
        self._made_of = made_of

    def read(self) -> Tensor:
        """True where a query sees a token."""
        return self._mask

    @cached_property
    def skippable(self) -> Tensor | None:
        """The same, or None where torch's own causal mask is that."""
        return sdpa_mask(**self._made_of)

    @cached_property
    def _mask(self) -> Tensor:
        mask = sdpa_mask(**{**self._made_of, "allow_is_causal_skip": False})
        assert mask is not None
        return mask

    @cached_property
    def reach(self) -> Reach | None:
        """Which tokens each query of the step sees; None where sequences are padded elsewhere than at their start."""
        batch_size, _, num_queries, _ = self.shape
        start, padding = self._made_of["q_offset"], self._made_of["attention_mask"]
        skip = None
        if padding is not None and not (padding.shape[1] == start + num_queries and bool(padding.all())):
            skip = _left_padding(padding, start + num_queries)
            if skip is None:
                _say_once()
                return None
        return causal([start] * batch_size, [num_queries] * batch_size, self.window, skip=skip)


def _left_padding(mask: Tensor, num_tokens: int) -> list[int] | None:
    """Tokens at the start of each sequence that a mask `[batch_size, num_tokens]` hides; None if it hides others."""
    skipped = (mask.cumsum(1) == 0).sum(1)
    if mask.shape[1] != num_tokens or bool((skipped + mask.sum(1) != num_tokens).any()):
        return None
    padding: list[int] = skipped.tolist()
    return padding


@cache
def _say_once() -> None:
    _log.warning(
        "keys and values are gathered, which is slower: the attention_mask pads sequences elsewhere than at their "
        "start. Try: tokenizer.padding_side='left'"
    )


def paged_mask(**made_of: Any) -> Tensor | None:
    """What transformers calls to make a mask: see `sdpa_mask` there for the arguments."""
    # Transformers forbids the shortcut of a causal mask where the mask is another one.
    if not made_of.get("allow_is_causal_skip", True) or torch.compiler.is_compiling():
        mask: Tensor | None = sdpa_mask(**{**made_of, "allow_is_causal_skip": False})
        return mask
    # A static cache counts on in the very tensor that says where queries begin.
    made_of["q_offset"] = int(made_of["q_offset"])
    shape = (made_of["batch_size"], 1, made_of["q_length"], made_of["kv_length"])
    return LazyMask(shape, torch.bool, torch.device(made_of["device"]), made_of)


def paged_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as layers of transformers call it.

    Args:
        module: the layer.
        query: `[batch_size, n_q_heads, num_queries, head_dim]`.
        key: `[batch_size, n_kv_heads, num_tokens, head_dim]`.
        value: `[batch_size, n_kv_heads, num_tokens, value_dim]`.
        attention_mask: what `paged_mask` returned, or any mask that torch's attention takes.
        **settings: scaling, softcap, sliding_window, s_aux (sinks) and whatever the family passes besides.

    Returns:
        `[batch_size, num_queries, n_q_heads, value_dim]`; and weights where the attention that computes it has them.
    """
    if (
        isinstance(key, PagedStates)
        and isinstance(attention_mask, LazyMask)
        and attention_mask.shape[2:] == (query.shape[2], key.shape[2])
        and _causal_alone(module, query, attention_mask, settings)
        and _readable(key.pages)
        and (reach := attention_mask.reach) is not None
    ):
        scale = settings.get("scaling")
        output = attend(
            query.transpose(1, 2).flatten(0, 1),
            key.pages,
            reach,
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            softcap=settings.get("softcap"),
            sinks=settings.get("s_aux"),
        )
        return output.unflatten(0, (query.shape[0], query.shape[2])), None
    return _over_gathered(module, query, key, value, attention_mask, settings)


def read_pages_in_place(model: Any) -> None:
    """Let a model on the CPU read pages where they lie, if there is a kernel; else it stays as it is."""
    takes = model.config._attn_implementation in ("sdpa", "eager")
    if takes and model.device.type == "cpu" and load_kernel("pages") is not None:
        model.set_attn_implementation(NAME)


def _causal_alone(module: Any, query: Tensor, mask: LazyMask, settings: dict[str, Any]) -> bool:
    """Whether the step is causal attention with nothing else that the kernels do not know."""
    is_causal = settings.get("is_causal")
    return (
        mask.window == settings.get("sliding_window")
        and query.dtype in QUERY_TYPES
        and not (query.requires_grad and torch.is_grad_enabled())
        and not settings.get("dropout")
        and not settings.get("output_attentions")
        and settings.get("position_bias") is None
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )


def _readable(pages: LayerView) -> bool:
    opened = pages.open_pages
    return pages.pages.layout is not None and (opened is None or opened.layout is not None)


def _over_gathered(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model has by default."""
    keys, values = (states.read() if isinstance(states, LazyTensor) else states for states in (key, value))
    eager = _eager_attention(type(module).__module__)
    if eager is None:
        plain = mask.skippable if isinstance(mask, LazyMask) else mask
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, keys, values, plain, **settings)
        return output
    plain = mask.read() if isinstance(mask, LazyMask) else mask
    if plain is not None and plain.dtype == torch.bool:
        plain = query.new_zeros(()).where(plain, torch.finfo(query.dtype).min)
    output = eager(module, query, keys, values, plain, **settings)
    return output


@cache
def _eager_attention(module: str) -> Any:
    """The eager attention of a family that torch's own does not suffice for, as transformers decides; else None."""
    family = vars(sys.modules[module])
    models = [item for item in family.values() if isinstance(item, type) and issubclass(item, PreTrainedModel)]
    suffices = all(model._supports_sdpa for model in models if model.__module__ == module)
    return None if suffices else family["eager_attention_forward"]


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, paged_mask)
