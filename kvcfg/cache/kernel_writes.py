"""How kernels write pages: the layouts and recipes of `kernels/cpu/append.py` and `close.py`, from parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvcfg.cache.layout import ELEMENTS, SCALE_TYPES, ElementFormat, PageLayout, ScaleType, page_layout
from kvcfg.formats import SideRecipe
from kvcfg.formats.codec import Codec, LayerCalibration
from kvcfg.formats.scales import NARROWER
from kvcfg.kernels.cpu.append import append_tokens
from kvcfg.kernels.cpu.close import ClosingSide, PageCloser, level_table
from kvcfg.params import KVCacheParams

_EIGHT_BITS = (ElementFormat.INT8, ElementFormat.E4M3, ElementFormat.E5M2)


class TokenWriter:
    """Writes tokens one by one into pages of one device.

    Args:
        layout: where they lie in a page.
        codecs: of keys and of values, layer by layer.

    Attributes:
        layout: the layout as a struct of int64.
        row_layout: that of a page of one token.
    """

    def __init__(self, layout: PageLayout, codecs: Sequence[tuple[Codec, Codec]]) -> None:
        self._codecs, self.layout, self.row_layout = codecs, tuple(layout.ints()), tuple(_one_token(layout).ints())
        self._row_bytes = sum(codec.element_row_bytes + codec.scale_row_bytes for codec in codecs[0])
        self._head_scales = [head_scales(pair) for pair in codecs]
        self._watches = layout.keys.format in _EIGHT_BITS and layout.keys.scale_type == ScaleType.NONE
        self._watches |= layout.values.format in _EIGHT_BITS and layout.values.scale_type == ScaleType.NONE

    def put(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor, rows: Tensor | None, pages: Tensor) -> bool:
        """Encode and store tokens; the arguments and the result of `append_tokens`."""
        if not self._watches:
            return append_tokens(keys, values, slots, pages, self.layout, rows, self._head_scales[layer])
        return self._watched(layer, keys, values, slots, pages, self.layout, rows)

    def encode(self, layer: int, keys: Tensor, values: Tensor) -> Tensor | None:
        """Tokens as a page of one token each `[num_tokens, row_bytes]`; None where there is no code for them."""
        if keys.ndim != 3 or keys.device.type != "cpu":
            return None
        num_tokens = len(keys)
        rows, slots = torch.empty((num_tokens, self._row_bytes), dtype=torch.uint8), torch.arange(num_tokens)
        return rows if self._watched(layer, keys, values, slots, rows, self.row_layout, None) else None

    def _watched(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        pages: Tensor,
        layout: tuple[int, ...],
        rows: Tensor | None,
    ) -> bool:
        """Store tokens and count what was cut off."""
        clipped = torch.zeros(2, dtype=torch.int64)
        if not append_tokens(keys, values, slots, pages, layout, rows, self._head_scales[layer], clipped):
            return False
        for codec, count in zip(self._codecs[layer], clipped, strict=True):
            codec.count(count, len(slots))
        return True


def token_writer(params: KVCacheParams, codecs: Sequence[tuple[Codec, Codec]]) -> TokenWriter | None:
    """What writes tokens into the pages of a layer group on one CPU device; None where the kernel does not."""
    layout = _token_layout(params)
    return None if layout is None else TokenWriter(layout, codecs)


def _token_layout(params: KVCacheParams) -> PageLayout | None:
    """The layout of pages that are filled token by token; None where the kernel does not write them."""
    if params.closes_pages:
        return None
    layout = page_layout(params, params.head_dim if params.is_mla else None)
    if layout is None or ElementFormat.CODES4 in (layout.keys.format, layout.values.format):
        return None
    return replace(layout, values=replace(layout.values, dim=0)) if params.is_mla else layout


def _one_token(layout: PageLayout) -> PageLayout:
    """The layout of a page of one token: regions follow one another as in a larger one."""
    keys, values = (
        replace(side, elements=side.elements // layout.page_size, scales=side.scales // layout.page_size)
        for side in (layout.keys, layout.values)
    )
    return replace(layout, page_size=1, keys=keys, values=values)


def page_closers(
    params: KVCacheParams, codecs: Sequence[tuple[Codec, Codec]], calibrated: Sequence[LayerCalibration]
) -> list[PageCloser] | None:
    """What encodes the closed pages of each layer on one CPU device; None where the kernel does not.

    Args:
        params: the layer group.
        codecs: of keys and of values, layer by layer.
        calibrated: what was measured of the heads on this device, layer by layer; empty = nothing.
    """
    recipe, size, n_heads = params.storage, params.page_size, params.n_kv_heads_per_device
    sides = ((recipe.keys, params.head_dim), (recipe.values, params.value_dim))
    if not params.closes_pages or not all(_is_written(side, dim) for side, dim in sides if dim):
        return None
    elements = [side.element_bytes(size, n_heads, dim) for side, dim in sides]
    scales = sum(elements), sum(elements) + recipe.keys.scale_bytes(size, n_heads, params.head_dim)
    closers = list[PageCloser]()
    measurements: Sequence[LayerCalibration | None] = calibrated or [None] * len(codecs)
    for (key_codec, value_codec), measured in zip(codecs, measurements, strict=True):
        matrices = measured.keys.matrices if measured and recipe.keys.transform == "balanced" else None
        keys = _side(recipe.keys, params.head_dim, key_codec, matrices, 0, scales[0])
        values = _side(recipe.values, params.value_dim, value_codec, None, elements[0], scales[1])
        closers.append(PageCloser(size, n_heads, recipe.keys.sink_tokens, keys, values))
    return closers


def head_scales(codecs: Sequence[Codec]) -> Tensor | None:
    """Scales `[2, n_heads]` of keys and of values that are not stored; None if they are 1."""
    scales = [codec.fixed_scales for codec in codecs]
    if all(item is None for item in scales):
        return None
    ones = torch.ones(codecs[0].n_heads)
    return torch.stack([ones if item is None else item.flatten().to(torch.float32) for item in scales])


def _is_written(side: SideRecipe, dim: int) -> bool:
    known = side.element_format.is_packed or side.element_format.dtype in ELEMENTS
    scales = side.is_scaled and side.scale_dtype in SCALE_TYPES and side.scales_per_token(dim) == 1
    return known and scales and not (side.sink_tokens and side.transform == "none")


def _side(side: SideRecipe, dim: int, codec: Codec, matrices: Tensor | None, elements: int, scales: int) -> ClosingSide:
    element, levels = side.element_format, codec.levels
    return ClosingSide(
        dim=dim,
        format=ELEMENTS.get(element.dtype, ElementFormat.CODES4),
        bits=element.bits,
        asymmetric=element.asymmetric,
        scale_type=SCALE_TYPES[side.scale_dtype],
        centred=side.is_centred,
        turned=side.transform != "none",
        elements=elements,
        scales=scales,
        largest=element.max_value,
        levels=None if levels is None else level_table(tuple(levels.tolist())),
        narrower=torch.tensor(NARROWER.get(element.bits, ()), dtype=torch.float64),
        matrices=None if matrices is None else matrices.to(torch.float32).contiguous(),
    )
