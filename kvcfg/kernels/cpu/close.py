"""Whole pages of few bits, made in C++ (`pages/close.h`) from pages that were filled token by token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.formats.codebook import cells_of
from kvcfg.kernels.cpu.page_kernels import address, layout_address, page_kernel

# CloseSide, and the fields of CloseCall before, between and after its parts; eight bytes each.
_SIDE, _SHAPE, _PAGES, _OPEN, _THREADS = Struct("9qdPPqP"), Struct("3q"), Struct("qPPqP"), Struct("PqP"), Struct("q")

_BIN, _MOST_LEVELS = 32, 64


class OpenPages(NamedTuple):
    """Pages that hold tokens one by one: `[num_pages, page_bytes]` uint8, and their layout as a struct of int64."""

    pages: Tensor
    layout: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClosingSide:
    """How the keys, or the values, of one layer are stored in a page; numbers are those of `page_layout.h`.

    Attributes:
        dim: numbers of a head; 0 = there is nothing to store.
        format: element format.
        bits: bits of an element.
        asymmetric: whether zeros are stored beside the scales.
        scale_type: what one scale is; every token has one a head.
        centred: whether the mean of the page is taken away, and stored.
        turned: whether a Hadamard matrix turns the numbers.
        elements: byte of the page where elements begin.
        scales: byte where scales begin, with what follows them.
        largest: the largest element.
        levels: of formats of few bits what `level_table` makes; None of others.
        narrower: float64 `[n]`, narrower ranges that are tried, as parts of the full one.
        matrices: float32 `[n_kv_heads, dim, dim]`, dense, in place of Hadamard's; None = that.
    """

    dim: int
    format: int
    bits: int
    asymmetric: bool
    scale_type: int
    centred: bool
    turned: bool
    elements: int
    scales: int
    largest: float
    levels: Tensor | None
    narrower: Tensor
    matrices: Tensor | None

    def struct(self) -> bytes:
        """The struct that the kernel reads; it points to this side's tensors."""
        return _SIDE.pack(
            self.dim,
            self.format,
            self.bits,
            self.asymmetric,
            self.scale_type,
            self.centred,
            self.turned,
            self.elements,
            self.scales,
            self.largest,
            address(self.levels),
            address(self.narrower),
            len(self.narrower),
            address(self.matrices),
        )


class PageCloser:
    """Encodes pages of one layer.

    Args:
        page_size: tokens in a page.
        n_kv_heads: KV heads.
        sink_tokens: first tokens of a page that are kept in int8.
        keys: how keys are stored.
        values: how values are stored.
    """

    def __init__(
        self, page_size: int, n_kv_heads: int, sink_tokens: int, keys: ClosingSide, values: ClosingSide
    ) -> None:
        self._sides = keys, values
        self._recipe = _SHAPE.pack(page_size, n_kv_heads, sink_tokens) + keys.struct() + values.struct()

    def close(self, page_ids: Tensor, pages: Tensor, places: Tensor, opened: OpenPages, fresh: OpenPages) -> bool:
        """Encode pages from their tokens as they are stored; all tensors on the CPU, all but the layouts dense.

        Scales are those that `formats.codec.Codec` chooses, elements those of its decoded numbers, up to rounding.

        Args:
            page_ids: int64 `[n]`, the pages to fill.
            pages: uint8 `[num_pages, page_bytes]`, one layer; written.
            places: int64 `[n * page_size]`, where each token is: its slot in `opened`, or -1 - its slot in `fresh`.
            opened: pages that were filled before.
            fresh: tokens that never were in one.

        Returns:
            Whether the pages are stored; False, and nothing changed, where there is no code for this.
        """
        function = page_kernel("close")
        if function is None:
            return False
        call = (
            self._recipe
            + _PAGES.pack(len(page_ids), page_ids.data_ptr(), pages.data_ptr(), pages.shape[1], places.data_ptr())
            + _open_struct(opened)
            + _open_struct(fresh)
            + _THREADS.pack(torch.get_num_threads())
        )
        return not function(call)


@cache
def level_table(levels: tuple[float, ...]) -> Tensor:
    """What the kernel must know of the levels of a format of few bits: the struct `Levels` as float32.

    A number goes to the level that `formats.codebook.Codebook` puts it to, cell by cell.

    Args:
        levels: the numbers of all codes; of equal ones the first code is written.
    """
    exact = [round(level, 6) for level in levels]
    ordered, low, cells_per_unit, nearest = cells_of(exact)
    count = len(ordered)
    table = torch.zeros(3, _MOST_LEVELS)
    table[0, :count] = torch.tensor(ordered, dtype=torch.float64)
    table[1, :count] = torch.tensor([float(exact.index(level)) for level in ordered])
    table[2] = torch.inf
    table[2, : count - 1] = torch.searchsorted(nearest, torch.arange(1, count))
    uniform = ordered == [low + place for place in range(count)]
    head = torch.tensor([count, low, cells_per_unit, uniform], dtype=torch.float32)
    return torch.cat((head, table.flatten(), nearest[::_BIN].to(torch.float32)))


def _open_struct(opened: OpenPages) -> bytes:
    return _OPEN.pack(opened.pages.data_ptr(), opened.pages.shape[1], layout_address(opened.layout))
