"""float4_e2m1fn: a sign, 2 exponent bits and 1 mantissa bit; up to 6, no NaN, no infinity."""

from __future__ import annotations

from kvcfg.formats import Format
from kvcfg.formats.codebook import Codebook

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class FP4(Codebook):
    """Stores numbers as the nearest of 15 levels, in the bits of the type; the negative zero is never written."""

    def __init__(self, element_format: Format) -> None:
        super().__init__(element_format.bits, [*_MAGNITUDES, *(-level for level in _MAGNITUDES)])
