"""Attention in plain torch: what every backend must compute.

    score    s = scale * q · k, or softcap * tanh(scale * q · k / softcap)
    weight   w = exp(s) / (sum of exp(s) over the tokens that are seen + exp(sink))
    output   sum of w * v; 0 of a query that sees nothing

A sequence's tokens are gathered and decoded, and query head h reads KV head h // (query heads a KV head).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from kvcfg.attention.reach import Reach
from kvcfg.cache.storage import KeysValues


class SequenceTokens(Protocol):
    """What this reads of a layer: a `LayerView`, or anything that has its tokens."""

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""

    def tokens(self, sequence: int, first: int, stop: int, dtype: torch.dtype) -> KeysValues:
        """Tokens `[first, stop)` of a sequence, decoded."""


def attend(
    queries: Tensor,
    view: SequenceTokens,
    reach: Reach,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `kvcfg.attention.attend`; computed in float64 for float64 queries, else in float32."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    output = queries.new_zeros((*queries.shape[:2], view.value_dim))
    starts = reach.query_starts.tolist()
    for sequence, (begin, end) in enumerate(pairwise(starts)):
        first, stop = reach.first[begin:end], reach.stop[begin:end]
        seeing = stop > first
        if not seeing.any():
            continue
        lowest, highest = int(first[seeing].min()), int(stop[seeing].max())
        keys, values = view.tokens(sequence, lowest, highest, dtype)
        positions = torch.arange(lowest, highest, device=first.device)
        seen = (positions >= first.unsqueeze(1)) & (positions < stop.unsqueeze(1))
        own = queries[begin:end].to(dtype).unflatten(1, (keys.shape[1], -1))
        scores = scale * torch.einsum("qhgd,thd->qhgt", own, keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        weights = _weights(scores, None if sinks is None else sinks.to(dtype).view(own.shape[1:3]))
        output[begin:end] = torch.einsum("qhgt,thd->qhgd", weights, values).flatten(1, 2).to(output.dtype)
    return output


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis, with a sink for each head; 0 where nothing is seen."""
    largest = scores.amax(-1, keepdim=True)
    logits = None if sinks is None else sinks.expand(scores.shape[:3]).unsqueeze(-1)
    if logits is not None:
        largest = torch.maximum(largest, logits)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if logits is not None:
        total = total + (logits - largest).exp()
    return weights / total.masked_fill(total == 0, 1)
