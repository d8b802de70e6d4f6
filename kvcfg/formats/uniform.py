"""Whole numbers of 6 to 2 bits: symmetric about zero, or counted from a zero that is stored beside the scale."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcfg.formats import Format
from kvcfg.formats.codebook import Codebook


class Uniform(Codebook):
    """Stores numbers rounded to the nearest whole number, ties to even.

    Args:
        element_format: how many bits, and up to which number.
        lowest: the number of code 0; the codes above it count up.
    """

    def __init__(self, element_format: Format, lowest: float) -> None:
        # A code beyond the largest number is never written.
        highest = element_format.max_value
        super().__init__(element_format.bits, [min(lowest + code, highest) for code in range(2**element_format.bits)])
        self._lowest, self._highest = lowest, highest

    def rounded(self, numbers: Tensor) -> Tensor:
        """The nearest whole number in range, same shape; NaN stays NaN."""
        return numbers.round().clamp_(self._lowest, self._highest)

    def _codes(self, numbers: Tensor) -> Tensor:
        return self.rounded(numbers).sub_(self._lowest).nan_to_num_(nan=-self._lowest).to(torch.uint8)


class Symmetric(Uniform):
    """-1 to 1 in 2 bits up to -31 to 31 in 6; NaN becomes 0."""

    def __init__(self, element_format: Format) -> None:
        super().__init__(element_format, -element_format.max_value)


class Asymmetric(Uniform):
    """0 to 3 in 2 bits up to 0 to 63 in 6, above a stored zero; NaN becomes 0."""

    def __init__(self, element_format: Format) -> None:
        super().__init__(element_format, 0.0)
