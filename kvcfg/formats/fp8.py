"""8-bit floats: e4m3 up to 448 with 3 mantissa bits, e5m2 up to 57344 with 2.

torch's own cast back to float32 is slow on CPUs. e4m3 is looked up in a table of all 256 elements instead; e5m2 is
the upper half of a float16, which is faster still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcfg.formats import Format


class E4M3:
    """Stores numbers as float8_e4m3fn, rounded to nearest, ties to even; one NaN, no infinity."""

    dtype = torch.float8_e4m3fn

    def __init__(self, element_format: Format) -> None:
        self._max_value = element_format.max_value
        self._table = torch.arange(256, dtype=torch.uint8).view(self.dtype).to(torch.float32)

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Cast numbers; magnitudes above 448 saturate, NaN stays NaN."""
        return numbers.to(torch.float32).clamp(-self._max_value, self._max_value).to(self.dtype)

    def from_elements(self, elements: Tensor) -> Tensor:
        """The float32 numbers of stored elements, a new tensor."""
        self._table = self._table.to(elements.device)
        index = elements.view(torch.uint8).to(torch.int32).flatten()
        return torch.index_select(self._table, 0, index).view(elements.shape)


class E5M2:
    """Stores numbers as float8_e5m2, rounded to nearest, ties to even; its infinities are never written."""

    dtype = torch.float8_e5m2

    def __init__(self, element_format: Format) -> None:
        self._max_value = element_format.max_value

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Cast numbers; magnitudes above 57344 saturate, NaN stays NaN."""
        return numbers.to(torch.float32).clamp(-self._max_value, self._max_value).to(self.dtype)

    def from_elements(self, elements: Tensor) -> Tensor:
        """The float32 numbers of stored elements, a new tensor."""
        half = elements.view(torch.uint8).to(torch.int16) << 8
        return half.view(torch.float16).to(torch.float32)
