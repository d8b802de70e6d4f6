"""Where the numbers of a page lie, as kernels are told: Python's side of `kernels/cpu/pages/page_layout.h`.

Kernels read pages of floats, 8-bit and 4-bit elements whose scales, if any, belong to one token in one head. What they
do not read has no layout, and is read through its codec.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum

from kvcfg.dtypes import DType
from kvcfg.errors import ShapeError
from kvcfg.formats import SINK, Format, SideRecipe
from kvcfg.params import KVCacheParams

_ABSENT = -1


class ElementFormat(IntEnum):
    """How one number is stored; 4-bit codes are looked up in a table of 16 levels."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    E4M3 = 3
    E5M2 = 4
    INT8 = 5
    CODES4 = 6


class ScaleType(IntEnum):
    """What one stored scale is; NONE where a head has one scale for all tokens, which is not stored."""

    NONE = 0
    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3


ELEMENTS = {
    DType.float32: ElementFormat.FLOAT32,
    DType.float16: ElementFormat.FLOAT16,
    DType.bfloat16: ElementFormat.BFLOAT16,
    DType.float8_e4m3fn: ElementFormat.E4M3,
    DType.float8_e5m2: ElementFormat.E5M2,
    DType.int8: ElementFormat.INT8,
}

SCALE_TYPES = {
    DType.float32: ScaleType.FLOAT32,
    DType.float16: ScaleType.FLOAT16,
    DType.bfloat16: ScaleType.BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class SideLayout:
    """The keys, or the values, of a page; offsets are bytes from its beginning, -1 = not there.

    Attributes:
        format: how one number is stored.
        dim: numbers of a head.
        elements: where the first token's elements begin, sinks left out.
        token_bytes: from one token's elements to the next one's.
        head_bytes: from one head's elements to the next one's.
        scales: where the first token's scales begin, one a head.
        scale_type: what one scale is.
        means: where the page's means `[n_kv_heads, dim]` are, in the type of scales.
        sinks: where the int8 elements of the page's first tokens begin.
        sink_scales: where their float16 scales begin.
        zeros: where the first token's zeros begin, as its scales.
    """

    format: ElementFormat
    dim: int
    elements: int
    token_bytes: int
    head_bytes: int
    scales: int
    scale_type: ScaleType
    means: int
    sinks: int
    sink_scales: int
    zeros: int

    def ints(self) -> list[int]:
        """The struct that kernels read."""
        return [int(item) for item in astuple(self)]


@dataclass(frozen=True, slots=True)
class PageLayout:
    """One layer's page on one device.

    Attributes:
        page_size: tokens.
        n_kv_heads: KV heads.
        sink_tokens: first tokens of a page that are kept in int8.
        turned: whether keys and values are stored turned by a Hadamard matrix.
        keys, values: the sides; values of a latent (MLA) are the first numbers of its keys.
    """

    page_size: int
    n_kv_heads: int
    sink_tokens: int
    turned: bool
    keys: SideLayout
    values: SideLayout

    def ints(self) -> list[int]:
        """The struct that kernels read."""
        own = [self.page_size, self.n_kv_heads, self.sink_tokens, int(self.turned)]
        return own + self.keys.ints() + self.values.ints()


def page_layout(params: KVCacheParams, value_dim: int | None = None) -> PageLayout | None:
    """The layout of one layer's page on one device; None of pages that kernels do not read.

    Those have elements of another width than 32, 16, 8 or 4 bits, scales of 8 bits, scales that belong to part of a
    head or to several tokens, or keys turned by calibrated matrices.

    Args:
        params: the layer group; of one whose pages close `params.open_pages` has the layout of the open ones.
        value_dim: for MLA, how many numbers of the latent are read as value (its rank); else as stored.

    Raises:
        ShapeError: if a latent's rank is missing or too large, or another width of values than the stored one is
            asked for.
    """
    width = value_width(params, value_dim)
    recipe, together = params.storage, params.closes_pages
    stored = [side for side, dim in _sides(params) if dim]
    if not all(_is_read(side, dim, together) for side, dim in _sides(params) if dim):
        return None
    tokens, n_heads = params.page_size, params.n_kv_heads_per_device
    rows, row_tokens = (1, tokens) if together else (tokens, 1)
    elements = [rows * side.element_bytes(row_tokens, n_heads, dim) for side, dim in _sides(params)]
    scales = sum(elements) + rows * recipe.keys.scale_bytes(row_tokens, n_heads, params.head_dim)
    keys = _side(recipe.keys, params, params.head_dim, 0, sum(elements))
    if params.is_mla:
        values = SideLayout(keys.format, width, *astuple(keys)[2:])
    else:
        values = _side(recipe.values, params, width, elements[0], scales)
    turned = stored[0].transform != "none"
    return PageLayout(tokens, n_heads, recipe.keys.sink_tokens, turned, keys, values)


def value_width(params: KVCacheParams, value_dim: int | None = None) -> int:
    """Numbers of a value as queries read it; see `page_layout`."""
    stored = params.value_dim
    if params.is_mla:
        if value_dim is None or not 0 < value_dim <= params.head_dim:
            raise ShapeError(
                f"value_dim={value_dim}: a latent of {params.head_dim} numbers is read as a value too, by its first "
                f"ones. Try: value_dim=<the model's kv_lora_rank>, at most {params.head_dim}"
            )
        return value_dim
    if value_dim not in (None, stored):
        raise ShapeError(f"value_dim={value_dim}: values are stored with {stored} numbers. Try: value_dim=None")
    return stored


def _sides(params: KVCacheParams) -> tuple[tuple[SideRecipe, int], tuple[SideRecipe, int]]:
    return (params.storage.keys, params.head_dim), (params.storage.values, params.value_dim)


def _is_read(side: SideRecipe, dim: int, together: bool) -> bool:
    if _element_format(side.element_format) is None or side.transform == "balanced":
        return False
    if side.sink_tokens and side.transform == "none":  # sinks are always turned
        return False
    if side.element_format.asymmetric and not together:  # zeros would stand between the scales of tokens
        return False
    return not side.is_scaled or (side.scale_dtype in SCALE_TYPES and side.scales_per_token(dim) == 1)


def _element_format(element: Format) -> ElementFormat | None:
    return ElementFormat.CODES4 if element.bits == 4 else ELEMENTS.get(element.dtype)


def _side(side: SideRecipe, params: KVCacheParams, dim: int, elements: int, scales: int) -> SideLayout:
    n_heads, element = params.n_kv_heads_per_device, side.element_format
    kind = _element_format(element)
    assert kind is not None
    head_bytes = element.value_bytes(dim)
    own = side.own_tokens(params.page_size) * n_heads * side.scale_dtype.size_in_bytes if side.is_scaled else 0
    zeros = scales + own
    means = zeros + own * element.asymmetric
    sinks = means + n_heads * dim * side.scale_dtype.size_in_bytes * side.is_centred
    sink_scales = sinks + SINK.element_bytes(side.sink_tokens, n_heads, dim)
    return SideLayout(
        format=kind,
        dim=dim,
        elements=elements,
        token_bytes=n_heads * head_bytes,
        head_bytes=head_bytes,
        scales=scales,
        scale_type=SCALE_TYPES[side.scale_dtype] if side.is_scaled else ScaleType.NONE,
        means=means if side.is_centred else _ABSENT,
        sinks=sinks if side.sink_tokens else _ABSENT,
        sink_scales=sink_scales if side.sink_tokens else _ABSENT,
        zeros=zeros if element.asymmetric else _ABSENT,
    )
