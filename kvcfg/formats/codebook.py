"""Elements of a few bits that each stand for one of 2**bits levels, whatever the levels are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.formats.packing import Packing

_CELLS = 8192


class Cells(NamedTuple):
    """The grid over some levels.

    Attributes:
        levels: the different ones, in ascending order.
        low: where the grid begins.
        cells_per_unit: cells in a range of 1.
        nearest: int64 `[8192]`, for each cell the index of its level.
    """

    levels: list[float]
    low: float
    cells_per_unit: float
    nearest: Tensor


def cells_of(levels: Sequence[float]) -> Cells:
    """The grid in which the nearest of some levels is looked up."""
    ordered = sorted(set(levels))
    low, cells_per_unit = ordered[0], _CELLS / (ordered[-1] - ordered[0])
    in_order = torch.tensor(ordered, dtype=torch.float64)
    middles = low + (torch.arange(_CELLS, dtype=torch.float64) + 0.5) / cells_per_unit
    return Cells(ordered, low, cells_per_unit, torch.bucketize(middles, (in_order[1:] + in_order[:-1]) / 2))


class Codebook:
    """Stores numbers as the nearest level, packed.

    The nearest level is looked up in a grid of 8192 cells over the range of the levels, each of which goes to the
    level nearest to its middle: a number is put to the wrong side only where it lies within half a cell of
    the threshold, and so is as near to one level as to the other for all that counts.

    Args:
        bits: bits of an element.
        levels: 2**bits numbers by code; where two are the same the first code is used.
    """

    dtype = torch.uint8

    def __init__(self, bits: int, levels: Sequence[float]) -> None:
        self._packing = Packing(bits)
        ordered, self._low, self._cells_per_unit, nearest = cells_of(levels)
        in_order = torch.tensor(ordered, dtype=torch.float64)
        codes = torch.tensor([list(levels).index(level) for level in ordered], dtype=torch.uint8)
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self._code_of_cell, self._level_of_cell = codes[nearest], in_order[nearest].to(torch.float32)
        self._table = self._packing.table(self.levels)
        self.has_zero = 0.0 in ordered

    def rounded(self, numbers: Tensor) -> Tensor:
        """The level nearest to each number, same shape; NaN becomes some level."""
        return self._looked_up(self._level_of_cell, numbers)

    def to_elements(self, numbers: Tensor) -> Tensor:
        """Pack `[n, count]` numbers; those beyond the levels saturate, NaN becomes some level."""
        return self._packing.pack(self._codes(numbers))

    def from_elements(self, elements: Tensor) -> Tensor:
        """The float32 numbers `[n, count]` of packed elements."""
        self._table = self._table.to(elements.device)
        return self._packing.look_up(elements, self._table)

    def _codes(self, numbers: Tensor) -> Tensor:
        return self._looked_up(self._code_of_cell, numbers)

    def _looked_up(self, by_cell: Tensor, numbers: Tensor) -> Tensor:
        cells = (numbers - self._low).mul_(self._cells_per_unit).clamp_(0, _CELLS - 1).to(torch.int32)
        # What a NaN is cast to depends on the machine, so that it is brought into the grid again.
        index = cells.clamp_(0, _CELLS - 1).flatten()
        return torch.index_select(by_cell.to(numbers.device), 0, index).view(numbers.shape)
