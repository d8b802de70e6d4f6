"""One replica: the place where integers (the ledger) and bytes (storage, states, page tables) meet.

What the ledger decides is carried out at once: new pages enter the page tables, pages that share content are
copied, states follow their sequences.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.closing_step import closing_step, segment_from
from kvcfg.cache.ledger import PageGroup, PageLedger
from kvcfg.cache.page_tables import PageTables
from kvcfg.cache.pages import Allocation, Commit, PageCopy, PageRun, PageTable, SeqId
from kvcfg.cache.prefix import PageHasher
from kvcfg.cache.states import StateStorage
from kvcfg.cache.step import GroupStep, Step, growing_step, windowed_step
from kvcfg.cache.storage import PagedStorage
from kvcfg.errors import CapacityError
from kvcfg.formats.codec import LayerCalibration
from kvcfg.params import KVCacheParams, MultiKVCacheParams, table_columns
from kvcfg.sizing import max_lengths
from kvcfg.units import ceil_div

Calibration = Sequence[Sequence[LayerCalibration] | None]
"""What was measured beforehand: per layer group, and in it per layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """What a cache does with pages beyond holding them; the keys of the same names in the `cache` group.

    Attributes:
        enable_prefix_caching: keep full pages for other sequences that start with the same tokens.
        hasher: names pages by their content; None = sha256 without a namespace.
        eviction: which cached page goes first.
        verify_prefix_tokens: compare token ids before a hit is believed.
        reuse_partial_pages: copy the common beginning of a page that is left in its middle.
        enable_dp_cross_replica_prefix_copy: copy a prefix from the replica that has it.
    """

    enable_prefix_caching: bool = True
    hasher: PageHasher | None = None
    eviction: str = "lru"
    verify_prefix_tokens: bool = False
    reuse_partial_pages: bool = False
    enable_dp_cross_replica_prefix_copy: bool = True


class CacheReplica:
    """Pages, states and tables of all layer groups on the shards of one replica.

    Args:
        params: what each group stores.
        num_pages: pages that growing groups share; null pages come on top.
        max_batch_size: sequences held at the same time.
        max_seq_len: tokens of the longest one.
        devices: one device per tensor parallel shard.
        options: prefix caching and eviction.
        calibrated: per group what was measured beforehand of its layers, or None; None = nothing of any.
    """

    def __init__(
        self,
        params: MultiKVCacheParams,
        *,
        num_pages: int,
        max_batch_size: int,
        max_seq_len: int,
        devices: Sequence[torch.device],
        options: CacheOptions,
        calibrated: Calibration | None = None,
    ) -> None:
        self.params, self.devices = params, tuple(devices)
        self.num_pages, self.max_batch_size, self.max_seq_len = num_pages, max_batch_size, max_seq_len
        pages = [
            num_pages if group.grows else max_batch_size * group.pages_per_sequence(max_seq_len)
            for group in params.params
        ]
        self.ledger = PageLedger(
            num_pages,
            params.page_size,
            [
                PageGroup(group.kind, group.kind, group.window, None if group.window is None else count)
                for group, count in zip(params.params, pages, strict=True)
            ],
            enable_prefix_caching=options.enable_prefix_caching,
            hasher=options.hasher,
            eviction=options.eviction,
            verify_tokens=options.verify_prefix_tokens,
            # A sequence writes on in open pages, which a page that closed, read as it was stored, cannot fill.
            reuse_partial_pages=options.reuse_partial_pages and not any(group.closes_pages for group in params.params),
            num_draft_tokens=params.num_draft_tokens,
            reads_first=True,
            bytes_for_pages=self._bytes_per_device,
        )
        self.storages = [
            self._storage(group, count, layers) if group.stores_pages else None
            for group, count, layers in zip(params.params, pages, calibrated or [None] * len(pages), strict=True)
        ]
        self._closing = [storage for storage in self.storages if isinstance(storage, ClosingStorage)]
        self.states = [
            StateStorage(group, max_batch_size, devices) if group.kind == "linear" else None for group in params.params
        ]
        self.tables = PageTables(params, pages, max_batch_size, max_seq_len, devices)
        self._null_pages = pages
        self._windowed = [place for place, group in enumerate(params.params) if group.window is not None]
        self._rows: dict[SeqId, int] = {}
        self._free_rows = list(range(max_batch_size))[::-1]
        # A window's old pages leave the ledger when new ones are allocated; the step still reads them.
        self._befores: dict[SeqId, dict[int, PageTable]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on all shards: pages, states, tables."""
        stores = [store for store in (*self.storages, *self.states) if store is not None]
        return sum(store.nbytes for store in stores) + self.tables.nbytes

    def claim(
        self,
        seq_id: SeqId,
        tokens: Iterable[int] | None,
        *,
        salt: bytes = b"",
        names: Sequence[Hashable] | None = None,
        priority: int = 0,
    ) -> None:
        """Begin a sequence; see `PageLedger.claim`.

        Raises:
            CapacityError: if there are `max_batch_size` sequences already.
        """
        self._check_row()
        self.ledger.claim(seq_id, tokens, salt=salt, names=names, priority=priority)
        self._give_row(seq_id)

    def alloc(self, seq_id: SeqId, num_new_tokens: int, lookahead: int = 0) -> Allocation:
        """Make room for tokens of one sequence; see `PageLedger.alloc`."""
        befores = self._windows(seq_id)
        done = self.ledger.alloc(seq_id, num_new_tokens, lookahead=lookahead)
        self.tables.apply(self._rows[seq_id], done.new_pages)
        self.copy(done.copies)
        if done.cached_tokens:
            self._begin_closing(seq_id)
        if self._windowed:
            found = done.cached_tokens > 0
            self._befores[seq_id] = self._windows(seq_id) if found else self._befores.get(seq_id, befores)
        return done

    def alloc_batch(self, seq_ids: Sequence[SeqId], num_new_tokens: int, lookahead: int = 0) -> None:
        """The same room for every sequence of a batch, or for none; see `PageLedger.alloc_batch`."""
        befores = {seq_id: self._windows(seq_id) for seq_id in seq_ids} if self._windowed else {}
        for run in self.ledger.alloc_batch(seq_ids, num_new_tokens, lookahead=lookahead):
            self.tables.apply(self._rows[run.seq_id], [run])
        for seq_id, before in befores.items():
            self._befores.setdefault(seq_id, before)

    def commit(self, seq_ids: Sequence[SeqId], num_tokens: int, *, num_drafts: int | None = None) -> Commit:
        """Count as many tokens of every sequence as stored; see `PageLedger.commit`."""
        done = self.ledger.commit_batch(seq_ids, num_tokens, num_drafts=num_drafts)
        self.enter(done)
        if self._closing and done.closed:
            self._close(done)
        for seq_id in seq_ids if self._befores else ():
            self._befores.pop(seq_id, None)
        return done

    def enter(self, done: Commit) -> None:
        """Enter the pages into the tables that a commit exchanged for others of the same content."""
        for run in done.moved:
            self.tables.apply(self._rows[run.seq_id], [run])

    def begin_copied(self, seq_id: SeqId, done: Commit) -> None:
        """Enter pages that were copied from another replica, closed as they were there."""
        self.enter(done)
        self._begin_closing(seq_id)

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """Begin a sequence as a copy of another; see `PageLedger.fork`."""
        self._check_row()
        self.copy(self.ledger.fork(parent, child))
        row = self._give_row(child)
        for state in self.states:
            if state is not None:
                state.copy(self._rows[parent], row)
        for storage in self._closing:
            storage.fork(self._rows[parent], row)
        for group in range(len(self.params.params)):
            self._enter_table(child, group)

    def truncate(self, seq_id: SeqId, length: int) -> None:
        """Take back tokens; see `PageLedger.truncate`.

        Raises:
            ValueError: if a linear layer's state holds the tokens already.
        """
        stored = self.ledger.length(seq_id)
        if length < stored and any(self.states):
            raise ValueError(f"cannot truncate sequence {seq_id!r}: a linear layer's state cannot be taken back")
        self.ledger.truncate(seq_id, length)

    def release(self, seq_id: SeqId) -> None:
        """End a sequence; its pages stay cached until they are handed out."""
        self.ledger.release(seq_id)
        row = self._rows.pop(seq_id)
        self.tables.clear(row)
        self._free_rows.append(row)
        self._befores.pop(seq_id, None)

    def row(self, seq_id: SeqId) -> int:
        """Row of a sequence in page tables, and the number of its ring of open pages."""
        return self._rows[seq_id]

    def step_limit(self, seq_id: SeqId) -> int | None:
        """The most tokens of a sequence whose queries read the same bytes; None = any number. See `closing_step`."""
        if not self._closing:
            return None
        start, closed = self.ledger.length(seq_id), self.ledger.num_closed(seq_id)
        return segment_from(start, closed, self.params.page_size, self.params.num_draft_tokens).stop - start

    def lay_out(
        self,
        seq_ids: Sequence[SeqId],
        num_tokens: Sequence[int],
        *,
        ahead: int = 0,
        max_cache_length: int | None = None,
    ) -> Step:
        """Lay out a step of sequences that have room for it; see `Step`.

        Args:
            seq_ids: the batch.
            num_tokens: per sequence, tokens of the step.
            ahead: tokens of each sequence that are stored and not committed, in groups that grow.
            max_cache_length: tokens that the page tables are to cover; None = as many as the batch needs.

        Raises:
            ValueError: if room is missing, or a sequence with a window was allocated and is left out.
        """
        starts = [self.ledger.length(seq_id) + ahead for seq_id in seq_ids]
        ends = [start + count for start, count in zip(starts, num_tokens, strict=True)]
        if left_out := [seq_id for seq_id in self._befores if seq_id not in seq_ids]:
            raise ValueError(f"sequence {left_out[0]!r} was allocated too: with windows, all of them share a step")
        columns = self._columns(max(ends), max_cache_length)
        groups = list[GroupStep | None]()
        growing: dict[bool, GroupStep] = {}
        for place, group in enumerate(self.params.params):
            if group.grows and group.closes_pages in growing:
                groups.append(growing[group.closes_pages])
            elif group.stores_pages and (group.grows or not ahead):
                layout = self.lay_out_group(place, seq_ids, starts, num_tokens)
                groups.append(layout)
                if group.grows:
                    growing[group.closes_pages] = layout
            else:
                groups.append(None)
        rows = [self._rows[seq_id] for seq_id in seq_ids]
        shards = self.tables.load(rows, starts, columns)
        longest = torch.tensor(max_lengths(max(num_tokens), max(ends)), dtype=torch.uint32)
        return Step(tuple(seq_ids), tuple(starts), tuple(num_tokens), tuple(groups), tuple(shards), longest)

    def lay_out_group(
        self, place: int, seq_ids: Sequence[SeqId], starts: Sequence[int], num_tokens: Sequence[int]
    ) -> GroupStep:
        """Where one group reads and writes in a step; sequences have `starts` tokens stored."""
        group = self.params.params[place]
        if group.closes_pages:
            return self._closing_step(place, seq_ids, starts, num_tokens)
        if group.grows:
            rows = [self._rows[seq_id] for seq_id in seq_ids]
            return growing_step(self.tables, place, group.page_size, rows, starts, num_tokens)
        afters = [self.ledger.page_table(seq_id, place) for seq_id in seq_ids]
        befores = [
            self._befores[seq_id][place] if seq_id in self._befores else after
            for seq_id, after in zip(seq_ids, afters, strict=True)
        ]
        columns = self.tables.columns(place)
        return windowed_step(group, self._null_pages[place], befores, afters, starts, num_tokens, columns)

    def copy(self, copies: Sequence[PageCopy], origin: CacheReplica | None = None) -> None:
        """Copy pages byte for byte, within this replica, where none is copied to itself, or from another one."""
        for group, storage in enumerate(self.storages):
            pairs = [
                (source, target)
                for place, source, target in copies
                if place == group and (origin is not None or source != target)
            ]
            if pairs and storage is not None:
                sources, targets = torch.tensor(pairs).T
                storage.copy_pages(sources, targets, None if origin is None else origin.storages[group])

    def state(self, seq_id: SeqId, group: int, layer: int) -> tuple[Tensor, ...]:
        """A sequence's state in one layer of a linear group; see `StateStorage.state`."""
        storage = self.states[group]
        assert storage is not None
        return storage.state(layer, self._rows[seq_id])

    def check_integrity(self) -> None:
        """Recount the ledger, and compare page tables with it.

        Raises:
            AssertionError: if something disagrees.
        """
        self.ledger.check_integrity()
        rows = sorted([*self._rows.values(), *self._free_rows])
        assert rows == list(range(self.max_batch_size)), f"rows {rows} are held or free"
        for seq_id, row in self._rows.items():
            for group, storage in enumerate(self.storages):
                first, pages = self.ledger.page_table(seq_id, group)
                if storage is not None and pages:
                    columns = torch.arange(first, first + len(pages))
                    entered = self.tables.pages(group, torch.tensor(row), columns).tolist()
                    assert entered == list(pages), f"page table of {seq_id!r} has {entered}, the ledger {pages}"

    def _storage(
        self, group: KVCacheParams, num_pages: int, calibrated: Sequence[LayerCalibration] | None
    ) -> PagedStorage:
        if group.closes_pages:
            return ClosingStorage(group, num_pages, self.max_batch_size, self.devices, calibrated)
        return PagedStorage(group, num_pages, self.devices, calibrated)

    def _closing_step(
        self, place: int, seq_ids: Sequence[SeqId], starts: Sequence[int], num_tokens: Sequence[int]
    ) -> GroupStep:
        group, rows = self.params.params[place], [self._rows[seq_id] for seq_id in seq_ids]
        longest = max(start + count for start, count in zip(starts, num_tokens, strict=True))
        columns = torch.arange(ceil_div(longest, group.page_size))
        return closing_step(
            self.tables.pages(place, torch.tensor(rows).unsqueeze(1), columns),
            rows,
            starts,
            num_tokens,
            # A step that begins with tokens which are stored and not committed finds the pages closed that they filled.
            [
                max(self.ledger.num_closed(seq_id), (start - group.num_draft_tokens) // group.page_size)
                for seq_id, start in zip(seq_ids, starts, strict=True)
            ],
            page_size=group.page_size,
            ring_pages=group.open_pages_per_sequence,
            horizon=group.num_draft_tokens,
        )

    def _begin_closing(self, seq_id: SeqId) -> None:
        """Pages that a sequence was given whole are closed already."""
        for storage in self._closing:
            storage.begin(self._rows[seq_id], self.ledger.num_closed(seq_id))

    def _close(self, done: Commit) -> None:
        """Close what a commit made final beyond what the steps did; pages exchanged for others are whole."""
        whole = {(run.seq_id, run.first + place) for run in done.moved for place in range(len(run.pages))}
        growing = next(place for place, group in enumerate(self.params.params) if group.grows)
        for seq_id in dict.fromkeys(run.seq_id for run in done.closed):
            pages = self.ledger.page_table(seq_id, growing).pages[: self.ledger.num_closed(seq_id)]
            for storage in self._closing:
                storage.close(
                    self._rows[seq_id], [None if (seq_id, n) in whole else page for n, page in enumerate(pages)]
                )

    def _check_row(self) -> None:
        if not self._free_rows:
            raise CapacityError(
                f"the cache holds {self.max_batch_size} sequences already; release one. "
                f"Try: workload.max_batch_size={self.max_batch_size + 1}"
            )

    def _give_row(self, seq_id: SeqId) -> int:
        row = self._free_rows.pop()
        self._rows[seq_id] = row
        for state in self.states:
            if state is not None:
                state.clear(row)
        for storage in self._closing:
            storage.begin(row, 0)
        return row

    def _enter_table(self, seq_id: SeqId, group: int) -> None:
        first, pages = self.ledger.page_table(seq_id, group)
        self.tables.apply(self._rows[seq_id], [PageRun(seq_id, group, first, pages)])

    def _windows(self, seq_id: SeqId) -> dict[int, PageTable]:
        return {group: self.ledger.page_table(seq_id, group) for group in self._windowed}

    def _columns(self, longest: int, max_cache_length: int | None) -> int:
        page_size = self.params.page_size
        limit = self.max_seq_len + self.params.spec_decode_cache_slack
        if max_cache_length is not None and not longest <= max_cache_length <= limit:
            raise ValueError(
                f"max_cache_length={max_cache_length} must be from {longest}, what the batch needs, to {limit}, "
                "the longest sequence of this cache"
            )
        return table_columns(ceil_div(max_cache_length or longest, page_size))

    def _bytes_per_device(self, num_pages: int) -> int:
        total = self.params.memory(num_pages, self.max_batch_size, self.max_seq_len).total
        return ceil_div(total, self.params.tensor_parallel_degree)
