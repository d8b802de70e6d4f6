"""int8: whole numbers from -127 to 127, symmetric so that a scale is all it takes to read them."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_VALUE = 127.0


class Int8:
    """Stores numbers rounded to the nearest integer, ties to even."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Round `[..., dim]`; magnitudes above 127 saturate. int8 has no NaN: it becomes 0 under a NaN scale."""
        return numbers.round().clamp_(-_MAX_VALUE, _MAX_VALUE).nan_to_num_(nan=0.0).to(self._dtype)

    def from_elements(self, elements: Tensor) -> Tensor:
        """The float32 numbers of stored elements."""
        return elements.to(torch.float32)
