"""Attention of transformers that reads pages where they lie: the implementation `kvcfg`.

    model.set_attn_implementation("kvcfg")        # "sdpa" again: keys and values are gathered, as for any cache

A layer's `update` returns states that know their pages (`paged_states.py`), and masks are `LazyMask`, which know what
they are made of; models pass both on. A step that goes on over the end of a page that closes is stored and read piece
by piece. Where a layer asks for something else than causal attention, with or without a window or padding at the start,
over pages that kernels read, both are made plain and the attention that the model has by default computes it.
"""

from __future__ import annotations

import logging
import sys
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcfg.attention import Reach, attend, causal
from kvcfg.integrations.latent_attention import LatentStates, absorbs, attend_latents
from kvcfg.integrations.lazy_tensors import LazyTensor
from kvcfg.integrations.paged_states import NewStates, PagedStates, UnstoredStates
from kvcfg.integrations.serving.packed_states import PackedStates
from kvcfg.integrations.untraced import untraced
from kvcfg.kernels.cpu.attend import QUERY_TYPES
from kvcfg.kernels.cpu.loader import load_kernel

_log = logging.getLogger("kvcfg")

NAME = "kvcfg"
"""What transformers calls this attention."""


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
        self._pieces: dict[int, LazyMask] = {}

    def read(self) -> Tensor:
        """True where a query sees a token."""
        return self._mask

    def of_queries(self, span: slice) -> LazyMask:
        """The mask of some queries in a row over the tokens up to their last one; made once for all layers."""
        if span.start not in self._pieces:
            padding, start = self._made_of["attention_mask"], self._made_of["q_offset"]
            stop = start + span.stop
            shape = (self.shape[0], 1, span.stop - span.start, stop)
            changes = {
                "q_length": shape[2],
                "q_offset": start + span.start,
                "kv_length": stop,
                "attention_mask": None if padding is None else padding[:, :stop],
            }
            self._pieces[span.start] = LazyMask(shape, self.dtype, self.device, {**self._made_of, **changes})
        return self._pieces[span.start]

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


@untraced
def paged_mask(**made_of: Any) -> Tensor | None:
    """What transformers calls to make a mask: see `sdpa_mask` there for the arguments."""
    # Transformers forbids the shortcut of a causal mask where the mask is another one.
    if not made_of.get("allow_is_causal_skip", True):
        mask: Tensor | None = sdpa_mask(**{**made_of, "allow_is_causal_skip": False})
        return mask
    # A static cache counts on in the very tensor that says where queries begin.
    made_of["q_offset"] = int(made_of["q_offset"])
    shape = (made_of["batch_size"], 1, made_of["q_length"], made_of["kv_length"])
    return LazyMask(shape, torch.bool, torch.device(made_of["device"]), made_of)


@untraced
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
    if isinstance(key, PackedStates):
        return key.attended(query, settings), None
    if isinstance(key, UnstoredStates | LatentStates) and key.unstored is not None:
        return _piece_by_piece(module, query, key.unstored, attention_mask, settings)
    if (
        isinstance(key, PagedStates | LatentStates)
        and isinstance(attention_mask, LazyMask)
        and attention_mask.shape[2:] == (query.shape[2], key.shape[2])
        and _causal_alone(module, query, attention_mask, settings)
        and _readable(key, module, query)
        and (reach := attention_mask.reach) is not None
    ):
        assert key.pages is not None
        scale = settings.get("scaling")
        scale = query.shape[3] ** -0.5 if scale is None else scale
        if isinstance(key, LatentStates):
            return attend_latents(module, query, key.pages, reach, scale), None
        output = attend(
            query.transpose(1, 2).flatten(0, 1),
            key.pages,
            reach,
            scale=scale,
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


def _readable(states: PagedStates | LatentStates, module: Any, query: Tensor) -> bool:
    """Whether kernels read the pages, and a latent's layer is one that need not expand it."""
    pages = states.pages
    if pages is None or pages.pages.layout is None:
        return False
    opened = pages.open_pages
    return (opened is None or opened.layout is not None) and (isinstance(states, PagedStates) or absorbs(module, query))


def _piece_by_piece(
    module: Any, query: Tensor, new: NewStates, mask: Tensor | None, settings: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Store a step run after run of queries that read the same bytes; each attends before the next is stored."""
    outputs, weights, num_tokens = list[Tensor](), list[Tensor](), 0
    for span, keys, values in new.store_in_pieces():
        num_tokens = keys.shape[2]
        seen = mask.of_queries(span) if isinstance(mask, LazyMask) else _queries_of(mask, span, num_tokens)
        if new.has_latents:
            keys, values = module.expand_kv(keys, values)
        output, given = paged_attention(module, query[:, :, span], keys, values, seen, **settings)
        outputs.append(output)
        weights += [] if given is None else [given]
    # Weights of tokens that a run's queries do not see yet are 0.
    whole = [pad(given, (0, num_tokens - given.shape[3])) for given in weights]
    return torch.cat(outputs, dim=1), torch.cat(whole, dim=2) if whole else None


def _queries_of(mask: Tensor | None, span: slice, num_tokens: int) -> Tensor:
    """The mask of some queries in a row over the first tokens; None stands for a causal one."""
    if mask is not None:
        return mask[:, :, span, :num_tokens]
    num_queries = span.stop - span.start
    return torch.ones(1, 1, num_queries, num_tokens, dtype=torch.bool).tril(num_tokens - num_queries)


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
