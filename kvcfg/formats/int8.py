"""int8: whole numbers from -127 to 127, symmetric so that a scale is all it takes to read them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcfg.formats import Format


class Int8:
    """Stores numbers rounded to the nearest integer, ties to even."""

    dtype = torch.int8

    def __init__(self, element_format: Format) -> None:
        self._max_value = element_format.max_value

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Round numbers; magnitudes above 127 saturate. int8 has no NaN: it becomes 0."""
        rounded = numbers.round().clamp_(-self._max_value, self._max_value)
        return rounded.nan_to_num_(nan=0.0).to(self.dtype)

    def from_elements(self, elements: Tensor) -> Tensor:
        """The float32 numbers of stored elements, a new tensor."""
        return elements.to(torch.float32)
