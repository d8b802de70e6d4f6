"""Pages taken apart: sinks, the mean of the other tokens, and what is left of them.

Most of a key is common to its neighbours: the mean of a page is several times as long as what is left. It costs
one number per channel and page, and no calibration. The first token may be an attention sink, unlike all others: it
would spoil the mean, and it is read so much that an error in it shifts every probability, so that its key and value
are stored in int8. KIVI (Liu et al. 2024) takes a zero from each channel of a group of tokens, KVSink (2025) keeps
sinks apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.formats import SideRecipe


class Apart(NamedTuple):
    """Pages taken apart.

    Attributes:
        sinks: `[n, sink_tokens, n_heads, dim]`.
        means: `[n, 1, n_heads, dim]` float32, with the precision of the type they are stored in; None if none
            are taken.
        rest: `[n, tokens - sink_tokens, n_heads, dim]` float32, less their mean.
    """

    sinks: Tensor
    means: Tensor | None
    rest: Tensor


class Centring:
    """Takes pages apart as one side of a recipe asks."""

    def __init__(self, side: SideRecipe) -> None:
        self.sink_tokens, self._is_centred = side.sink_tokens, side.is_centred
        self._dtype = side.scale_dtype.to_torch()

    def apart(self, numbers: Tensor) -> Apart:
        """Take pages `[n, tokens, n_heads, dim]` float32 apart; what is not finite has no part in the mean."""
        sinks, rest = numbers[:, : self.sink_tokens], numbers[:, self.sink_tokens :]
        if not self._is_centred:
            return Apart(sinks, None, rest)
        finite = rest.isfinite()
        counts = finite.sum(1, keepdim=True).clamp(min=1)
        # In float64 a sum is finite whatever the numbers are.
        exact = rest.double().where(finite, 0.0).sum(1, keepdim=True) / counts
        limit = torch.finfo(self._dtype).max
        means = exact.clamp(-limit, limit).to(self._dtype).to(torch.float32)
        return Apart(sinks, means, rest - means)

    def together(self, parts: Apart) -> Tensor:
        """The inverse of `apart`, up to rounding; `parts.rest` may be overwritten."""
        if not self.sink_tokens:
            return parts.rest if parts.means is None else parts.rest.add_(parts.means)
        whole = parts.rest.new_empty((len(parts.rest), self.sink_tokens + parts.rest.shape[1], *parts.rest.shape[2:]))
        whole[:, : self.sink_tokens] = parts.sinks
        rest = whole[:, self.sink_tokens :]
        # Written where it belongs: reading pages is bound by memory.
        if parts.means is None:
            rest.copy_(parts.rest)
        else:
            torch.add(parts.rest, parts.means, out=rest)
        return whole
