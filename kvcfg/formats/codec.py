"""Tokens to stored bytes and back.

A tensor `[num_tokens, n_heads, dim]` becomes two byte tensors with one row a token: elements
`[num_tokens, n_heads * dim * bits / 8]` and scales `[num_tokens, n_heads * scales_per_token * scale_bytes]`.
Rows are plain bytes, so that a page can hold them packed, in any order, without regard to alignment.

    scale = amax / max_value        amax over the numbers that share the scale
    q     = clamp(x / scale)        then cast or rounded by the format
    x     = q * scale

The scale is rounded to the dtype it is stored in before it divides, so that q is made for the scale that
will be read. A NaN makes the scale of its own token NaN and reaches no other; an infinity saturates.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvcfg.formats import Format, Recipe
from kvcfg.registry import load_object

_FLOAT32_MAX = torch.finfo(torch.float32).max


class ElementCodec(Protocol):
    """One element format: float numbers within its range to stored elements and back."""

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Round numbers `[..., dim]` to the format; larger ones saturate, NaN stays NaN if the format has one."""

    def from_elements(self, elements: Tensor) -> Tensor:
        """The float32 numbers that stored elements stand for, same shape."""


class Encoded(NamedTuple):
    """Stored bytes of some tokens.

    Attributes:
        elements: uint8 `[num_tokens, element_row_bytes]`.
        scales: uint8 `[num_tokens, scale_row_bytes]`; no columns where nothing is scaled.
    """

    elements: Tensor
    scales: Tensor


class TokenCodec:
    """Encodes keys, or values, of one layer group.

    Args:
        element_format: how one number is stored.
        recipe: what shares a scale, and how scales are stored.
        n_heads: heads in a token.
        dim: width of a head.
    """

    def __init__(self, element_format: Format, recipe: Recipe, n_heads: int, dim: int) -> None:
        self.n_heads, self.dim = n_heads, dim
        self.scales_per_token = recipe.scales_per_token(element_format, dim)
        self.element_row_bytes = element_format.value_bytes(n_heads * dim)
        self.scale_row_bytes = n_heads * self.scales_per_token * recipe.scale_dtype.size_in_bytes
        self._max_value = element_format.max_value
        self._scale_dtype = recipe.scale_dtype.to_torch()
        # A hundredth below what float32 can hold, so that a rounded scale times the largest element is finite.
        self._max_scale = min(torch.finfo(self._scale_dtype).max, 0.99 * _FLOAT32_MAX / element_format.max_value)
        self._dtype = element_format.dtype.to_torch()
        self._codec: ElementCodec = load_object(element_format.codec)(self._dtype)

    def encode(self, numbers: Tensor) -> Encoded:
        """Quantize `[num_tokens, n_heads, dim]` of any float dtype; the input is left unchanged."""
        if not self.scales_per_token:
            no_scales = numbers.new_empty((len(numbers), 0), dtype=torch.uint8)
            return Encoded(_as_rows(self._codec.to_elements(numbers)), no_scales)
        groups = numbers.to(torch.float32).unflatten(-1, (self.scales_per_token, -1))
        scales = self._scales_of(groups)
        elements = self._codec.to_elements(groups / scales.to(torch.float32).unsqueeze(-1))
        return Encoded(_as_rows(elements), _as_rows(scales))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """Stored bytes back to numbers `[num_tokens, n_heads, dim]` in `dtype`."""
        num_tokens = len(encoded.elements)
        elements = encoded.elements.contiguous().view(self._dtype).view(num_tokens, self.n_heads, self.dim)
        if not self.scales_per_token:
            return self._codec.from_elements(elements).to(dtype)
        scales = encoded.scales.contiguous().view(self._scale_dtype).to(torch.float32)
        groups = self._codec.from_elements(elements).unflatten(-1, (self.scales_per_token, -1))
        numbers: Tensor = groups * scales.view(num_tokens, self.n_heads, self.scales_per_token, 1)
        return numbers.flatten(-2).to(dtype)

    def _scales_of(self, groups: Tensor) -> Tensor:
        """Scales `[..., scales_per_token]` in their stored dtype, never zero and never infinite."""
        exact = groups.abs().amax(dim=-1) / self._max_value
        if self._scale_dtype == torch.float8_e8m0fnu:
            # Powers of two only: the next one up, so that nothing is cut off.
            exact = torch.exp2(exact.log2().ceil())
        bounded = exact.clamp(max=self._max_scale)
        return torch.where(bounded < torch.finfo(self._scale_dtype).tiny, 1.0, bounded).to(self._scale_dtype)


def _as_rows(tensor: Tensor) -> Tensor:
    """`[num_tokens, ...]` of any dtype to its bytes, one row a token."""
    return tensor.flatten(1).contiguous().view(torch.uint8)
