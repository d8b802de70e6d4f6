"""The compiled engine of the ledger, for groups that grow, the lru policy and names that are chained or given.

The core owns sequences, pages and index; here its answers become the ledger's values and errors. Names that come
from outside are numbered, because a core's names all have the same width.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from ctypes import string_at
from itertools import takewhile
from math import ldexp
from struct import unpack

from kvcfg.cache.engine import Held
from kvcfg.cache.metrics import LedgerMetrics
from kvcfg.cache.outside_names import OutsideNames
from kvcfg.cache.pages import (
    GROWING,
    PAGELESS,
    Allocation,
    Commit,
    Forecast,
    PageCopy,
    PageGroup,
    PageRun,
    PageTable,
    SeqId,
)
from kvcfg.cache.prefix import PageHasher, token_ids, wide_ids
from kvcfg.cache.refusal import Shortage, check_commit, check_counts, check_cut, in_use, unclaimed, without_ids
from kvcfg.errors import CapacityError
from kvcfg.kernels.cpu.hash_chain import NAME_BYTES
from kvcfg.kernels.cpu.page_core import (
    LIFETIME_EXPONENTS,
    NO_IDS,
    CoreFunctions,
    CoreHead,
    RowHead,
    core_functions,
    hashing_addresses,
)

_NOTHING = Commit()


def compiled_steps(
    groups: Sequence[PageGroup],
    num_pages: int,
    page_size: int,
    hasher: PageHasher | None,
    num_draft_tokens: int,
    bytes_for_pages: Callable[[int], int] | None,
    clock: Callable[[], float],
) -> CompiledSteps | None:
    """The compiled engine; None if it is not made for these groups or this hasher, or cannot be had here."""
    growing = [place for place, group in enumerate(groups) if group.kind in GROWING]
    if not growing or any(group.kind not in (*GROWING, *PAGELESS) for group in groups):
        return None
    algorithm = "sha256" if hasher is None else hasher.algorithm if type(hasher) is PageHasher else ""
    hashing = hashing_addresses(algorithm)
    functions = core_functions() if hashing else None
    if functions is None:
        return None
    core = functions.new(num_pages, page_size, NAME_BYTES[algorithm], *hashing)
    names = [groups[place].name for place in growing]
    return CompiledSteps(
        functions, core, growing, names, num_pages, page_size, hasher, num_draft_tokens, bytes_for_pages, clock
    )


class CompiledSteps:
    """A core and the sequences in it, by name.

    Args:
        functions: what a core can do.
        core: its address.
        groups: indices of the groups that share its pages.
        group_names: their names, for errors.
        num_pages: pages of the pool.
        page_size: tokens in a page.
        hasher: names pages; None = no prefix cache.
        num_draft_tokens: tokens of a commit that may be taken back.
        bytes_for_pages: memory that a number of pages would take, for errors.
        clock: seconds.
    """

    def __init__(
        self,
        functions: CoreFunctions,
        core: int,
        groups: Sequence[int],
        group_names: Sequence[str],
        num_pages: int,
        page_size: int,
        hasher: PageHasher | None,
        num_draft_tokens: int,
        bytes_for_pages: Callable[[int], int] | None,
        clock: Callable[[], float],
    ) -> None:
        self._do, self._core, self._head = functions, core, CoreHead.from_address(core)
        self._groups, self._group_names = tuple(groups), tuple(group_names)
        self._num_pages, self._page_size, self._hasher, self._drafts = num_pages, page_size, hasher, num_draft_tokens
        self._width: int = 0 if hasher is None else NAME_BYTES[hasher.algorithm]
        self._bytes_for_pages, self._clock = bytes_for_pages, clock
        self._rows: dict[SeqId, int] = {}
        self._names = OutsideNames(self._width, num_pages)
        self._refusals = 0
        self._last_batch: list[SeqId] | None = None
        self._last_rows = array("Q")
        weakref.finalize(self, _delete, functions, core, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._rows

    def claim(
        self, seq_id: SeqId, tokens: Iterable[int] | None, salt: bytes, names: Sequence[Hashable] | None, priority: int
    ) -> None:
        """Begin a sequence; every page whose ids are known is named at once."""
        if seq_id in self._rows:
            raise in_use(seq_id)
        root, numbers, num_names, given = None, None, 0, None
        if self._hasher is not None:
            if names is not None:
                given = list(names)
                numbers, num_names = self._names.numbered(given, self._cached_names), len(given)
            elif tokens is not None:
                root = self._hasher.root(salt)
        claim = self._do.claim
        row: int | None = None
        wide = None if tokens is None else wide_ids(tokens)
        if wide is not None:
            row = claim(self._core, wide, len(wide) // 8, True, root, numbers, num_names)
        if row is None:
            ids = None if tokens is None else token_ids(tokens)
            address, count = (None, NO_IDS) if ids is None else ids.buffer_info()
            row = claim(self._core, address, count, False, root, numbers, num_names)
        assert row is not None
        self._rows[seq_id] = row
        if given is not None:
            self._names.of[seq_id] = given

    def extend(self, seq_id: SeqId, ids: array[int]) -> None:
        """Add ids."""
        row = self._row(seq_id)
        if RowHead.from_address(row).num_ids == NO_IDS:
            raise without_ids(seq_id)
        self._do.extend(row, *ids.buffer_info())

    def alloc(self, seq_id: SeqId, num_new_tokens: int, lookahead: int) -> Allocation:
        """Find a prefix, then make room."""
        row, head = self._row(seq_id), self._head
        check_counts(num_new_tokens, lookahead)
        if not self._do.alloc(self._core, row, num_new_tokens, lookahead, self._clock()):
            raise self._shortage([seq_id])
        pages = self._out()
        return Allocation(head.cached, head.length, self._runs(seq_id, head.first, pages) if pages else ())

    def alloc_batch(
        self, seq_ids: Sequence[SeqId], num_new_tokens: int, ids: array[int] | None, lookahead: int
    ) -> tuple[PageRun, ...]:
        """Make room for several sequences, or for none; then add an id to each."""
        rows = self._batch(seq_ids)
        check_counts(num_new_tokens, lookahead)
        addresses, count = rows.buffer_info()
        tokens = None if ids is None else ids.buffer_info()[0]
        fits = self._do.alloc_batch(self._core, addresses, count, num_new_tokens, lookahead, tokens, self._clock())
        out = self._out()
        if not fits:
            raise self._shortage([seq_ids[number] for number in out])
        runs, place = list[PageRun](), 0
        while place < len(out):
            number, first, added = out[place : place + 3]
            place += 3 + added
            runs += self._runs(seq_ids[number], first, out[place - added : place])
        return tuple(runs)

    def commit(self, seq_ids: Sequence[SeqId], num_tokens: int, num_drafts: int | None) -> Commit:
        """Count tokens as stored for several sequences, or for none; close what is final."""
        rows, drafts = self._batch(seq_ids), self._drafts if num_drafts is None else num_drafts
        check_counts(num_tokens, drafts)
        refused = self._do.commit(self._core, *rows.buffer_info(), num_tokens, drafts, self._clock())
        if refused >= 0:
            row = RowHead.from_address(rows[refused])
            known = None if row.num_ids == NO_IDS else row.num_ids
            check_commit(seq_ids[refused], row.length + num_tokens, row.num_pages * self._page_size, known)
        out = self._out()
        if not out:
            return _NOTHING
        closed, moved, place = list[PageRun](), list[PageRun](), 0
        while place < len(out):
            number, first, count, num_moved = out[place : place + 4]
            pages = out[place + 4 : place + 4 + count]
            place += 4 + count + num_moved
            closed += self._runs(seq_ids[number], first, pages)
            for index in out[place - num_moved : place]:
                moved += self._runs(seq_ids[number], index, pages[index - first : index - first + 1])
        return Commit(tuple(closed), tuple(moved))

    def count_copied(self, num_tokens: int) -> None:
        """Count tokens as cached that were counted as input."""
        self._head.input_tokens -= num_tokens
        self._head.cache_tokens += num_tokens

    def truncate(self, seq_id: SeqId, length: int) -> None:
        """Take back tokens of open pages, or closed pages as a whole."""
        address = self._row(seq_id)
        row = RowHead.from_address(address)
        check_cut(seq_id, row.length, row.closed, self._page_size, length)
        self._do.truncate(self._core, address, length)

    def fork(self, parent: SeqId, child: SeqId) -> tuple[PageCopy, ...]:
        """Begin a copy of a sequence."""
        address = self._row(parent)
        if child in self._rows:
            raise in_use(child)
        row = self._do.fork(self._core, address, self._clock())
        if row is None:
            raise self._shortage([parent])
        targets = self._out()
        sources = self._pages(address)[RowHead.from_address(address).closed :]
        self._rows[child] = row
        if parent in self._names.of:
            self._names.of[child] = self._names.of[parent]
        return tuple(
            [
                PageCopy(group, source, target)
                for group in self._groups
                for source, target in zip(sources, targets, strict=False)
            ]
        )

    def release(self, seq_id: SeqId, head_first: bool) -> None:
        """End a sequence."""
        self._do.release(self._core, self._row(seq_id), head_first or self._hasher is None)
        del self._rows[seq_id]
        self._last_batch = None
        self._names.of.pop(seq_id, None)

    def forecast(self, seq_id: SeqId, num_new_tokens: int, lookahead: int) -> Forecast:
        """What alloc would do."""
        row = self._row(seq_id)
        check_counts(num_new_tokens, lookahead)
        fits = self._do.forecast(self._core, row, num_new_tokens, lookahead)
        return Forecast(self._head.cached, self._head.needed, bool(fits))

    def length(self, seq_id: SeqId) -> int:
        """Tokens stored."""
        return int(RowHead.from_address(self._row(seq_id)).length)

    def room(self, seq_id: SeqId) -> int:
        """Slots beyond the tokens stored."""
        row = RowHead.from_address(self._row(seq_id))
        return int(row.num_pages * self._page_size - row.length)

    def table(self, seq_id: SeqId, group: int) -> PageTable:
        """Pages of a sequence in one group."""
        row = self._row(seq_id)
        return PageTable(0, self._pages(row) if group in self._groups else ())

    def page_names(self, seq_id: SeqId, num_new_tokens: int) -> tuple[Hashable, ...]:
        """Names of pages beyond those that are stored in full, as far as alloc would look for them."""
        address = self._row(seq_id)
        if self._hasher is None:
            return ()
        row, width = RowHead.from_address(address), self._width
        first, end = row.length // self._page_size, self._do.wanted(self._core, address, row.length + num_new_tokens)
        if seq_id in self._names.of:
            return tuple(self._names.of[seq_id][first:end])
        names = string_at(self._do.names(address), end * width) if end else b""
        return tuple([names[place : place + width] for place in range(first * width, end * width, width)])

    def num_closed(self, seq_id: SeqId) -> int:
        """How many pages are closed."""
        return int(RowHead.from_address(self._row(seq_id)).closed)

    def closed_pages(self, seq_id: SeqId) -> Held:
        """Pages that are closed."""
        row = self._row(seq_id)
        return [list(self._pages(row)[: RowHead.from_address(row).closed])]

    def find(self, page_names: Sequence[Hashable]) -> Held:
        """Pages of the longest run of names."""
        numbers = list(takewhile(bool, map(self._names.known, page_names)))
        self._do.run(self._core, b"".join(numbers), len(numbers))
        return [list(self._out())]

    def num_cached(self, page_names: Sequence[Hashable]) -> int:
        """Pages of the longest run of names."""
        return len(self.find(page_names)[0])

    def hold(self, held: Held) -> None:
        """Add a reference to pages that are cached or in use."""
        self._do.hold(self._core, array("i", held[0]).tobytes(), len(held[0]))

    def drop(self, held: Held) -> None:
        """Take a reference away, the last pages first."""
        self._do.drop(self._core, array("i", held[0][::-1]).tobytes(), len(held[0]))

    def forget_unused(self) -> int:
        """Take the names away from pages that nothing refers to."""
        return self._do.forget_unused(self._core)

    def metrics(self) -> LedgerMetrics:
        """The counters as they are now."""
        head = self._head
        none, *powers = head.lifetimes[:]
        lifetimes = {0.0: none} if none else {}
        lifetimes |= {
            ldexp(1.0, exponent): count for exponent, count in zip(LIFETIME_EXPONENTS, powers, strict=True) if count
        }
        return LedgerMetrics(
            num_pages=self._num_pages,
            used_pages=self._num_pages - head.num_free,
            cached_pages=head.num_cached,
            evictable_pages=head.evictable,
            input_tokens=head.input_tokens,
            cache_tokens=head.cache_tokens,
            evictions=head.evictions,
            refusals=self._refusals,
            page_lifetimes=lifetimes,
        )

    def reset_metrics(self) -> None:
        """Count from zero again."""
        head = self._head
        head.input_tokens = head.cache_tokens = head.evictions = self._refusals = 0
        head.lifetimes[:] = [0] * len(head.lifetimes)

    def check_integrity(self, pins: Iterable[Held]) -> None:
        """Recount references from sequences and pins, and look every cached page up.

        Raises:
            AssertionError: if something disagrees, or a page that a sequence may write has another holder or a name.
        """
        self._do.state(self._core)
        state = self._out()
        references, named, found = state[::3], state[1::3], state[2::3]
        counted = [0] * self._num_pages
        rows = {seq_id: RowHead.from_address(row) for seq_id, row in self._rows.items()}
        for page in [page for row in self._rows.values() for page in self._pages(row)] + [
            p for pin in pins for p in pin[0]
        ]:
            counted[page] += 1
        assert counted == list(references), "reference counts differ from what the sequences hold"
        self._do.free_pages(self._core)
        free = [page for page, number in enumerate(counted) if not number]
        assert sorted(self._out()) == free, "a free page is not in line once"
        head = self._head
        cached = [page for page in range(self._num_pages) if named[page]]
        assert [found[page] for page in cached] == cached, "index and page names differ"
        evictable = sum([not counted[page] for page in cached])
        counts = (head.num_free, head.num_cached, head.evictable)
        assert counts == (len(free), len(cached), evictable), f"free, cached and evictable pages are not {counts}"
        for seq_id, row in rows.items():
            where = f"sequence {seq_id!r}: {row.final} final, {row.length} stored, {row.num_pages} pages"
            assert 0 <= row.final <= row.length <= row.num_pages * self._page_size, where
            assert row.closed == row.final // self._page_size, f"{where}, {row.closed} closed"
            assert row.num_ids == NO_IDS or row.length <= row.num_ids, f"{where}: ids of {row.num_ids} are known"
            for page in self._pages(self._rows[seq_id])[row.closed :]:
                assert counted[page] == 1, f"open page {page} of {seq_id!r} has another holder"
                assert not named[page], f"open page {page} of {seq_id!r} can be found"

    def _row(self, seq_id: SeqId) -> int:
        row = self._rows.get(seq_id)
        if row is None:
            raise unclaimed(seq_id)
        return row

    def _batch(self, seq_ids: Sequence[SeqId]) -> array[int]:
        """Addresses of the rows; decode steps name the same batch again and again."""
        if isinstance(seq_ids, list) and seq_ids == self._last_batch:
            return self._last_rows
        try:
            rows = array("Q", map(self._rows.__getitem__, seq_ids))
        except KeyError as error:
            raise unclaimed(error.args[0]) from None
        if len(rows) > 1 and len(set(seq_ids)) < len(rows):
            raise ValueError("a sequence is named twice in one batch")
        if len(rows) > 1:
            self._last_batch, self._last_rows = list(seq_ids), rows
        return rows

    def _out(self) -> tuple[int, ...]:
        """What the last call left to read."""
        size = self._head.out_size
        return unpack(f"{size}i", string_at(self._head.out, 4 * size)) if size else ()

    def _pages(self, row: int) -> tuple[int, ...]:
        self._do.pages(self._core, row)
        return self._out()

    def _runs(self, seq_id: SeqId, first: int, pages: tuple[int, ...]) -> tuple[PageRun, ...]:
        return tuple([PageRun(seq_id, group, first, pages) for group in self._groups])

    def _cached_names(self) -> set[bytes]:
        """The names of the pages that are cached."""
        self._do.state(self._core)
        named, width = self._out()[1::3], self._width
        names = string_at(self._do.page_names(self._core), self._num_pages * width)
        return {names[page * width : (page + 1) * width] for page, is_named in enumerate(named) if is_named}

    def _shortage(self, asking: Sequence[SeqId]) -> CapacityError:
        """Count a refusal; what is said of it."""
        self._refusals += 1
        head = self._head
        return Shortage(
            asking=asking,
            groups=self._group_names,
            windowed=False,
            page_size=self._page_size,
            num_pages=self._num_pages,
            free=head.free,
            evictable=head.evictable_left,
            needed=head.needed,
            in_all=head.in_all,
            sequences=len(self._rows),
        ).error(self._bytes_for_pages)


def _delete(functions: CoreFunctions, core: int, rows: dict[SeqId, int]) -> None:
    for row in rows.values():
        functions.delete_row(row)
    functions.delete(core)
