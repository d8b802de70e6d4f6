"""The scales of groups of numbers, and the zeros of the asymmetric formats.

    symmetric    scale = amax / max_value                     amax: the largest magnitude of the group
    asymmetric   scale = (max - zero) / max_value             zero: the smallest number of the group

A scale is rounded to the type it is stored in before it divides, so that elements are made for the scale that will
be read: to nearest, or up where the type has 8 bits, so that nothing is cut off.

Elements of 4 bits and less have too few levels to spend one on the largest number alone. For them the scales of
narrower ranges are tried, down to 0.36 times the full one about its middle, and each group keeps the one with the
least squared error: AWQ's search for a clipping range (Lin et al. 2023), on the numbers themselves and without
calibration. The largest number always falls on the outermost level, so that of what was read the full range is
the range that was chosen: it has no error, and encoding again changes nothing.

A scale is never infinite, and 0 only in a group of zeros whose format has no level at 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcfg.formats import SideRecipe
from kvcfg.formats.codebook import Codebook

_FLOAT32_MAX = torch.finfo(torch.float32).max
_SMALLEST = {torch.float16: 2.0**-24, torch.float8_e4m3fn: 2.0**-9}
"""The smallest scales, where they are not the smallest normal number of the type."""

NARROWER = {
    4: (0.92, 0.84, 0.76),
    3: (0.92, 0.84, 0.76, 0.68, 0.6),
    2: (0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36),
}
"""Ranges that are tried, by bits. On normal numbers steps half as wide save another 2 percent of the error."""

_ZERO = torch.zeros(())

Rounding = Callable[[Tensor], Tensor]


class Scales:
    """Chooses scales, and zeros, for one side of a recipe.

    Args:
        side: format and scale type.
        codebook: the levels of a format of few bits; None of one that has zero and many levels.
    """

    def __init__(self, side: SideRecipe, codebook: Codebook | None) -> None:
        element = side.element_format
        self._dtype = side.scale_dtype.to_torch()
        self._asymmetric, self._max_value = element.asymmetric, element.max_value
        self._codebook = codebook
        self._narrower = NARROWER.get(element.bits, ())
        limits = torch.finfo(self._dtype)
        # A hundredth below what float32 can hold, so that a rounded scale times the largest element is finite.
        self._largest = min(limits.max, 0.99 * _FLOAT32_MAX / element.max_value)
        if self._dtype == torch.float8_e8m0fnu:
            self._largest = 2.0 ** int(torch.tensor(self._largest).log2().floor())
        self._smallest = _SMALLEST.get(self._dtype, limits.tiny)
        self._of_zeros = 1.0
        self.may_be_zero = codebook is not None and not codebook.has_zero
        if self.may_be_zero:
            self._of_zeros = limits.tiny if self._dtype == torch.float8_e8m0fnu else 0.0

    def choose(self, groups: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros of groups of float32 numbers that lie along `axis`, which is kept with one entry.

        They are as stored but still float32. A NaN makes those of its group NaN. Of asymmetric formats the difference
        of any two numbers must be finite.
        """
        low, high = self._range(groups, axis)
        scale, zero = self._stored(low, high)
        if self._codebook is not None and self._narrower:
            scale, zero = self._least_error(self._codebook.rounded, groups, axis, low, high, scale, zero)
        return scale, zero if self._asymmetric else None

    def _range(self, groups: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        if self._asymmetric:
            return groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        return _ZERO, groups.abs().amax(axis, keepdim=True)

    def _narrowed(self, low: Tensor, high: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        if not self._asymmetric:
            return low, high * factor
        cut = (high - low) * ((1 - factor) / 2)
        return low + cut, high - cut

    def _least_error(
        self, rounded: Rounding, groups: Tensor, axis: int, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the full range and the narrower ones, what gives each group the least squared error."""
        # In units of the full range's scale, so that no square is too large or too small for float32.
        unit = torch.where(scale == 0, 1.0, scale)
        numbers = (groups - zero) / unit
        least = (numbers - rounded(numbers)).square_().sum(axis, keepdim=True)
        full_zero = zero
        for factor in self._narrower:
            next_scale, next_zero = self._stored(*self._narrowed(low, high, factor))
            ratio, shift = next_scale / unit, (next_zero - full_zero) / unit
            shifted = numbers - shift if self._asymmetric else numbers
            error = (shifted - rounded(shifted / ratio).mul_(ratio)).square_().sum(axis, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, next_scale, scale), torch.where(better, next_zero, zero)
        return scale, zero

    def _stored(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of a range, with the precision they are stored in."""
        if not self._asymmetric:
            return self._rounded_scale(high / self._max_value), low
        limit = torch.finfo(self._dtype).max
        zero = low.clamp(-limit, limit).to(self._dtype).to(torch.float32)
        return self._rounded_scale((high - zero).clamp(min=0) / self._max_value), zero

    def _rounded_scale(self, exact: Tensor) -> Tensor:
        bounded = exact.clamp(max=self._largest)
        if self._dtype == torch.float8_e8m0fnu:
            stored = torch.exp2(bounded.log2().ceil())
        else:
            stored = bounded.to(self._dtype).to(torch.float32)
        if self._dtype == torch.float8_e4m3fn:
            stored = torch.where(stored < bounded, _next_e4m3(stored), stored)
        return torch.where(stored < self._smallest, self._of_zeros, stored)


def _next_e4m3(values: Tensor) -> Tensor:
    """The next larger e4m3 number of each; positive numbers are ordered as their bits."""
    bits = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return (bits + 1).view(torch.float8_e4m3fn).to(torch.float32)
