"""Page tables as kernels read them: `lookup[row, n]` is a sequence's n-th page, unused entries are the null page.

Growing groups have the same pages, so they share a table; each windowed group has one of its own, a ring in which
page n of the sequence stands in column `n % columns`. Rows belong to sequences from claim to release. They are
kept on the host and copied to the devices in the order of a batch, into two buffers in turn: what a step was given
stays as it is while the next one is being prepared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.cache.pages import PageRun
from kvcfg.params import NUM_TABLE_BUFFERS, MultiKVCacheParams


class BatchTables(NamedTuple):
    """One shard's view of a batch.

    Attributes:
        lookup: per layer group `[batch_size, columns]` uint32; groups with the same pages share it, None without pages.
        lengths: `[batch_size]` uint32, tokens stored before the step.
    """

    lookup: tuple[Tensor | None, ...]
    lengths: Tensor


class PageTables:
    """The tables of one replica.

    Args:
        params: the layer groups.
        null_pages: per group the page that pads its table.
        max_batch_size: rows.
        max_seq_len: tokens of the longest sequence.
        devices: one device per tensor parallel shard.

    Attributes:
        table_of: per group the number of its table; None without pages.
    """

    def __init__(
        self,
        params: MultiKVCacheParams,
        null_pages: Sequence[int],
        max_batch_size: int,
        max_seq_len: int,
        devices: Sequence[torch.device],
    ) -> None:
        columns = params.page_table_columns(max_seq_len)
        self.table_of = _tables_of(params)
        self._first_group = [self.table_of.index(table) for table in range(len(columns))]
        shapes = [(max_batch_size, width) for width in columns]
        self._null_pages = [null_pages[group] for group in self._first_group]
        self._rows = [
            torch.full(shape, page, dtype=torch.int32) for shape, page in zip(shapes, self._null_pages, strict=True)
        ]
        self._buffers = [
            [_Buffer(shapes, max_batch_size, device) for device in devices] for _ in range(NUM_TABLE_BUFFERS)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes on all shards."""
        return sum(buffer.nbytes for shards in self._buffers for buffer in shards)

    def apply(self, row: int, runs: Iterable[PageRun]) -> None:
        """Enter runs of a sequence's pages into its row."""
        for run in runs:
            table = self.table_of[run.group]
            if table is None or self._first_group[table] != run.group:
                continue
            rows = self._rows[table]
            pages = torch.tensor(run.pages, dtype=torch.int32)
            start, width = run.first % rows.shape[1], rows.shape[1]
            if start + len(pages) <= width:
                rows[row, start : start + len(pages)] = pages
            else:
                rows[row, torch.arange(start, start + len(pages)) % width] = pages

    def clear(self, row: int) -> None:
        """Fill a row with null pages."""
        for rows, page in zip(self._rows, self._null_pages, strict=True):
            rows[row] = page

    def pages(self, group: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Pages by row and index in the sequence, int64 on the host.

        Args:
            group: a group with pages.
            rows: int64 rows.
            columns: int64 indices of pages, broadcast against `rows`.
        """
        table = self.table_of[group]
        assert table is not None
        held = self._rows[table]
        return held[rows, columns % held.shape[1]].long()

    def columns(self, group: int) -> int:
        """Columns of the table of a group with pages."""
        table = self.table_of[group]
        assert table is not None
        return self._rows[table].shape[1]

    def load(self, rows: Sequence[int], lengths: Sequence[int], num_columns: int | None = None) -> list[BatchTables]:
        """Copy the rows of a batch to every shard; valid until the next call but one.

        Args:
            rows: rows of the batch, in its order.
            lengths: tokens stored of each.
            num_columns: columns that are needed of every table; None = all.
        """
        self._buffers.reverse()
        chosen = torch.tensor(rows)
        stored = torch.tensor(lengths, dtype=torch.int32)
        shards = []
        for buffer in self._buffers[0]:
            tables = []
            for target, held in zip(buffer.tables, self._rows, strict=True):
                width = min(held.shape[1], num_columns or held.shape[1])
                target[: len(rows), :width] = held[chosen, :width]
                tables.append(target[: len(rows), :width].view(torch.uint32))
            buffer.lengths[: len(rows)] = stored
            lookup = tuple(None if table is None else tables[table] for table in self.table_of)
            shards.append(BatchTables(lookup, buffer.lengths[: len(rows)].view(torch.uint32)))
        return shards


class _Buffer:
    """One shard's copy of all tables."""

    def __init__(self, shapes: Sequence[tuple[int, int]], max_batch_size: int, device: torch.device) -> None:
        self.tables = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]
        self.lengths = torch.zeros(max_batch_size, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables) + self.lengths.nbytes


def _tables_of(params: MultiKVCacheParams) -> tuple[int | None, ...]:
    """Numbers of the groups' tables, in the order of `params.page_table_columns`."""
    numbers: list[int | None] = []
    count, growing = 0, None
    for group in params.params:
        if not group.stores_pages:
            numbers.append(None)
        elif group.grows and growing is not None:
            numbers.append(growing)
        else:
            growing = count if group.grows else growing
            numbers.append(count)
            count += 1
    return tuple(numbers)
