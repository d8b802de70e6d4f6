"""float32, float16 and bfloat16: numbers are cast, and what lies beyond the range saturates."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcfg.formats import Format


class Cast:
    """Stores numbers in a float dtype as they are."""

    def __init__(self, element_format: Format) -> None:
        self.dtype = element_format.dtype.to_torch()

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Cast to the stored dtype; finite numbers beyond its range and infinities become its largest."""
        if numbers.dtype == self.dtype:
            return numbers
        largest = torch.finfo(self.dtype).max
        return numbers.to(torch.float32).clamp(-largest, largest).to(self.dtype)

    def from_elements(self, elements: Tensor) -> Tensor:
        """The stored numbers, unchanged."""
        return elements
