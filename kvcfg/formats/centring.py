"""Pages of keys less their mean, with their first keys kept apart.

Most of a key is common to its neighbours: the mean of a page is several times as long as what is left. It costs
one number per channel and page, and no calibration. Its first key may be an attention sink, unlike all others: it
would spoil the mean, and an error in it shifts every probability, so that it is stored in int8 beside the page.
KIVI (Liu et al. 2024) takes a zero from each channel of a group of tokens, KVSink (2025) keeps sinks apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.formats import SideRecipe


class Centred(NamedTuple):
    """Pages taken apart.

    Attributes:
        numbers: `[n, tokens, n_heads, dim]` float32, less their mean; 0 for sinks.
        means: `[n, 1, n_heads, dim]` float32, with the precision of the type they are stored in.
        sinks: `[n * sink_tokens, n_heads, dim]`.
    """

    numbers: Tensor
    means: Tensor
    sinks: Tensor


class Centring:
    """Takes pages apart as a centred side of a recipe asks."""

    def __init__(self, side: SideRecipe) -> None:
        self.sink_tokens, self._dtype = side.sink_tokens, side.scale_dtype.to_torch()

    def apart(self, numbers: Tensor) -> Centred:
        """Take pages `[n, tokens, n_heads, dim]` float32 apart; what is not finite has no part in the mean."""
        sinks, others = numbers[:, : self.sink_tokens], numbers[:, self.sink_tokens :]
        finite = others.isfinite()
        counts = finite.sum(1, keepdim=True).clamp(min=1)
        # In float64 a sum is finite whatever the numbers are.
        exact = others.double().where(finite, 0.0).sum(1, keepdim=True) / counts
        limit = torch.finfo(self._dtype).max
        means = exact.clamp(-limit, limit).to(self._dtype).to(torch.float32)
        centred = torch.cat((torch.zeros_like(sinks), others - means), dim=1)
        return Centred(centred, means, sinks.flatten(0, 1))

    def together(self, parts: Centred) -> Tensor:
        """The inverse of `apart`, up to rounding; `parts.numbers` is overwritten."""
        numbers = parts.numbers.add_(parts.means)
        if self.sink_tokens:
            numbers[:, : self.sink_tokens] = parts.sinks.view_as(numbers[:, : self.sink_tokens])
        return numbers
