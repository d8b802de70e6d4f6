"""Tokens to stored bytes and back, one by one or a page of them together.

Numbers `[n, tokens, n_heads, dim]` become two byte tensors of n rows: elements, and scales with what else belongs
to them. Rows are plain bytes, so that a page can hold them packed, in any order, without regard to alignment. Tokens
that are encoded one by one have no axis `tokens` and a row each.

    sinks, means, if any     taken away (`centring.py`)
    transform, if any        each token and head by itself (`transforms.py`)
    scale (and zero)         of the numbers that share them (`scales.py`), or calibrated
    q = (x - zero) / scale   rounded, cast and packed by the format
    x = q * scale + zero     the transform undone, the mean added

    elements    those of tokens that are no sinks
    scales      scales | zeros | means | sinks | scales of sinks

A NaN reaches no other token. It makes the scale of its own token NaN; where tokens share scales it is left out of
them and reads as about 0, unless the format has a NaN of its own. An infinity saturates; where tokens share
scales and a transform would spread it over its token, that token is read as if it were NaN.

Encoding does the same to every token and page whatever stands beside it, bit for bit on one machine. Unless means
are taken, what was decoded in float32 encodes to the same bytes again with float16 and bfloat16 scales, as long as
these are normal numbers of their type, and so does a float4_e2m1fn with 8-bit scales; float32 scales may change in
their last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvcfg.errors import ConfigError, ShapeError
from kvcfg.formats import SINK, SideRecipe
from kvcfg.formats.centring import Apart, Centring
from kvcfg.formats.codebook import Codebook
from kvcfg.formats.scales import Scales
from kvcfg.formats.transforms import Hadamard, HeadMatrices, HeadTransform
from kvcfg.registry import load_object

_FLOAT32_MAX = torch.finfo(torch.float32).max


class ElementCodec(Protocol):
    """One element format: float numbers within its range to stored elements and back."""

    dtype: torch.dtype

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Round numbers `[n, count]` to elements `[n, any]`; larger ones saturate, NaN stays if there is one."""

    def from_elements(self, elements: Tensor) -> Tensor:
        """The numbers `[n, count]` that stored elements stand for; float32 and a new tensor in scaled formats."""


class Encoded(NamedTuple):
    """Stored bytes of some tokens or pages.

    Attributes:
        elements: uint8 `[n, element_row_bytes]`.
        scales: uint8 `[n, scale_row_bytes]`; no columns where nothing is scaled.
    """

    elements: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was measured beforehand for the keys, or the values, of one layer.

    Attributes:
        matrices: `[n_heads, dim, dim]`, the transform `balanced`; None elsewhere.
        amax: `[n_heads]`, the largest magnitude, for scales that are `static`; None elsewhere.
    """

    matrices: Tensor | None = None
    amax: Tensor | None = None

    def of_heads(self, heads: slice) -> Calibrated:
        """The part of some heads."""
        return Calibrated(*(None if item is None else item[heads] for item in (self.matrices, self.amax)))


class LayerCalibration(NamedTuple):
    """What was measured beforehand of one layer, over all its KV heads."""

    keys: Calibrated
    values: Calibrated


class Codec:
    """Encodes keys, or values, of one layer.

    Args:
        side: how they are stored.
        n_heads: heads in a token.
        dim: width of a head.
        tokens: tokens that are encoded together, as those of a page are when it closes; None = one by one.
        calibrated: what was measured beforehand.

    Attributes:
        clipped: numbers that lay beyond the range of scales that do not follow them, so far; int64.
        encoded: numbers that were held to such scales.

    Raises:
        ConfigError: if elements do not fill whole bytes, or groups of tokens or numbers that share scales do not
            divide what is encoded together.
        ShapeError: if `balanced` keys have no matrices.
    """

    def __init__(
        self,
        side: SideRecipe,
        n_heads: int,
        dim: int,
        tokens: int | None = None,
        calibrated: Calibrated | None = None,
    ) -> None:
        self.n_heads, self.dim, self.tokens = n_heads, dim, tokens
        if problems := side.problems(dim, tokens):
            raise ConfigError(problems)
        together = tokens or 1
        self.element_row_bytes = side.element_bytes(together, n_heads, dim)
        self.scale_row_bytes = side.scale_bytes(together, n_heads, dim)
        own = side.own_tokens(together)
        self._count = own * n_heads * dim
        self._shape = (n_heads, dim) if tokens is None else (own, n_heads, dim)
        self._codec: ElementCodec = load_object(side.element_format.codec)(side.element_format)
        self._scale_dtype = side.scale_dtype.to_torch()
        codebook = self._codec if isinstance(self._codec, Codebook) else None
        self._scales = Scales(side, codebook) if self.scale_row_bytes else None
        self._asymmetric, self._shares_scales = side.element_format.asymmetric, side.shares_scales
        self._group_shape, self._axis = _groups(side, own, n_heads, dim)
        self._scale_shape = [size if axis != self._axis else 1 for axis, size in enumerate(self._group_shape, start=1)]
        self._turn = _transform(side, dim, calibrated) if dim else None
        self._centring = Centring(side) if (side.is_centred or side.sink_tokens) and dim else None
        self._sinks = Codec(SINK, n_heads, dim, side.sink_tokens) if side.sink_tokens and dim else None
        sink_parts = [0, 0] if self._sinks is None else [self._sinks.element_row_bytes, self._sinks.scale_row_bytes]
        mean_bytes = n_heads * dim * side.scale_dtype.size_in_bytes if side.is_centred else 0
        self._scale_parts = [self.scale_row_bytes - mean_bytes - sum(sink_parts), mean_bytes, *sink_parts]
        self._max_value = side.element_format.max_value
        self._fixed = _fixed_scale(side, calibrated)
        self._watches = side.element_format.scaled and self._scales is None
        self.clipped, self.encoded = torch.zeros((), dtype=torch.int64), 0

    @property
    def levels(self) -> Tensor | None:
        """The float32 numbers of the codes of a format of few bits, by code; None of other formats."""
        return self._codec.levels if isinstance(self._codec, Codebook) else None

    @property
    def fixed_scales(self) -> Tensor | None:
        """Calibrated scales `[n_heads, 1]` that are not stored; None where they are stored, or 1."""
        return self._fixed

    def count(self, clipped: Tensor, num_rows: int) -> None:
        """Count rows that were encoded, and the numbers in them that were cut off, where scales do not follow them."""
        if self._watches:
            self.clipped = self.clipped.to(clipped.device) + clipped
            self.encoded += num_rows * self._count

    def encode(self, numbers: Tensor) -> Encoded:
        """Quantize `[n, tokens, n_heads, dim]` of any float dtype; the input is left unchanged."""
        if self._centring is None:
            return self._encode(numbers)
        parts = self._centring.apart(numbers.to(torch.float32))
        elements, *scales = self._encode(parts.rest)
        if parts.means is not None:
            scales.append(_as_rows(parts.means.to(self._scale_dtype)))
        if self._sinks is not None:
            scales += self._sinks.encode(parts.sinks)
        return Encoded(elements, torch.cat(scales, dim=1))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """Stored bytes back to numbers `[n, tokens, n_heads, dim]` in `dtype`."""
        if self.dim == 0:  # bytes without columns cannot be viewed as wider elements
            return encoded.elements.new_empty((len(encoded.elements), *self._shape), dtype=dtype)
        if self._centring is None:
            return self._decode(encoded).to(dtype)
        scales, means, sink_elements, sink_scales = encoded.scales.split(self._scale_parts, dim=1)
        rest = self._decode(Encoded(encoded.elements, scales))
        shape = (len(rest), 1, self.n_heads, self.dim)
        parts = Apart(
            rest[:, :0] if self._sinks is None else self._sinks.decode(Encoded(sink_elements, sink_scales), rest.dtype),
            means.contiguous().view(self._scale_dtype).to(torch.float32).view(shape) if means.shape[1] else None,
            rest,
        )
        return self._centring.together(parts).to(dtype)

    def _encode(self, numbers: Tensor) -> Encoded:
        num_rows = len(numbers)
        if self._turn is not None:
            numbers = self._turn.apply(self._bounded(numbers.to(torch.float32)))
        if self._scales is None:
            return self._encode_unscaled(numbers)
        groups = numbers.to(torch.float32).reshape(num_rows, *self._group_shape)
        scales, zeros = self._scales.choose(self._without_nonfinite(groups), self._axis)
        shifted = groups if zeros is None else groups - zeros
        divisors = torch.where(scales == 0, 1.0, scales) if self._scales.may_be_zero else scales
        stored = scales if zeros is None else torch.cat((scales.flatten(1), zeros.flatten(1)), dim=1)
        elements = self._codec.to_elements((shifted / divisors).reshape(num_rows, self._count))
        return Encoded(_as_rows(elements), _as_rows(stored.to(self._scale_dtype)))

    def _encode_unscaled(self, numbers: Tensor) -> Encoded:
        num_rows = len(numbers)
        if self._fixed is not None:
            numbers = numbers.to(torch.float32) / self._fixed.to(numbers.device)
        if self._watches:
            self.count((numbers.abs() > self._max_value).sum(), num_rows)
        no_scales = numbers.new_empty((num_rows, 0), dtype=torch.uint8)
        return Encoded(_as_rows(self._codec.to_elements(numbers.reshape(num_rows, self._count))), no_scales)

    def _decode(self, encoded: Encoded) -> Tensor:
        num_rows = len(encoded.elements)
        numbers = self._codec.from_elements(encoded.elements.contiguous().view(self._codec.dtype))
        if self._scales is not None:
            stored = encoded.scales.contiguous().view(self._scale_dtype).to(torch.float32)
            parts = stored.view(num_rows, 1 + self._asymmetric, *self._scale_shape).unbind(1)
            numbers = numbers.view(num_rows, *self._group_shape).mul_(parts[0])
            if self._asymmetric:
                numbers.add_(parts[1])
        numbers = numbers.view(num_rows, *self._shape)
        if self._fixed is not None:
            numbers = numbers.to(torch.float32) * self._fixed.to(numbers.device)
        return numbers if self._turn is None else self._turn.undo(numbers.to(torch.float32))

    def _bounded(self, numbers: Tensor) -> Tensor:
        """What a sum over a head keeps finite; infinities become NaN where they would spoil the scales of others."""
        limit = _FLOAT32_MAX / (4 * self.dim)
        bounded = numbers.clamp(-limit, limit)
        return bounded.where(numbers.isfinite(), torch.nan) if self._shares_scales else bounded

    def _without_nonfinite(self, groups: Tensor) -> Tensor:
        """Groups for which scales are chosen: where tokens share them, of finite numbers only."""
        if not self._shares_scales:
            return groups
        finite = groups.isfinite()
        smallest = groups.where(finite, torch.inf).amin(self._axis, keepdim=True)
        return groups.where(finite, smallest.where(smallest.isfinite(), 0.0))


def clip_rate(codecs: Sequence[Codec]) -> float:
    """Share of the numbers that were cut off, of those whose scales do not follow them; 0 where all do."""
    encoded = sum(codec.encoded for codec in codecs)
    return sum(int(codec.clipped) for codec in codecs) / encoded if encoded else 0.0


def _transform(side: SideRecipe, dim: int, calibrated: Calibrated | None) -> HeadTransform | None:
    if side.transform == "none":
        return None
    if side.transform != "balanced":
        return Hadamard(dim)
    if calibrated is None or calibrated.matrices is None:
        raise ShapeError("transform=balanced needs a calibrated matrix for every layer: run kvcfg calibrate")
    return HeadMatrices(calibrated.matrices)


def _fixed_scale(side: SideRecipe, calibrated: Calibrated | None) -> Tensor | None:
    """Calibrated scales `[n_heads, 1]`; None where scales follow the numbers or are 1."""
    if calibrated is None or calibrated.amax is None or side.is_scaled or not side.element_format.scaled:
        return None
    amax = calibrated.amax.float()
    shared = amax.max().expand_as(amax) if side.granularity == "tensor" else amax
    return torch.where(shared > 0, shared / side.element_format.max_value, 1.0).unsqueeze(-1)


def _groups(side: SideRecipe, tokens: int, n_heads: int, dim: int) -> tuple[tuple[int, ...], int]:
    """The shape in which numbers that share a scale lie along one axis, and that axis, rows before it counted."""
    if side.shares_scales:
        size = side.block_size or tokens
        return (tokens // size, size, n_heads * dim), 2
    per_token = max(1, side.scales_per_token(dim))
    return (tokens * n_heads, per_token, dim // per_token), 3


def _as_rows(tensor: Tensor) -> Tensor:
    """`[n, ...]` of any dtype to its bytes, one row each."""
    return tensor.flatten(1).contiguous().view(torch.uint8)
