"""The engine of the ledger in Python: everything is checked first, then done."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

from kvcfg.cache.beginnings import Beginning
from kvcfg.cache.engine import Held
from kvcfg.cache.metrics import LedgerMetrics
from kvcfg.cache.pages import Allocation, Commit, Forecast, PageCopy, PageRun, PageTable, SeqId
from kvcfg.cache.prefix import PageHasher, token_ids
from kvcfg.cache.refusal import check_commit, check_counts, check_cut, in_use, unclaimed, without_ids
from kvcfg.cache.sequence import SequencePages, SequenceState
from kvcfg.cache.track import PagePlan
from kvcfg.cache.tracks import Changes, PageTracks

_NOTHING = Commit()


class _Intent(NamedTuple):
    """What an alloc is about to do: where hits end, the plan of each pool, and a page to copy from."""

    hit_end: int
    plans: list[PagePlan]
    beginning: Beginning | None = None


class LedgerSteps:
    """The rules of one replica; the caller keeps others out while a method runs.

    Args:
        tracks: all pools.
        hasher: names pages; None = no prefix cache.
        num_draft_tokens: tokens of a commit that may be taken back.
        bytes_for_pages: memory that a number of pages would take, for errors.
        clock: seconds.
    """

    def __init__(
        self,
        tracks: PageTracks,
        hasher: PageHasher | None,
        num_draft_tokens: int,
        bytes_for_pages: Callable[[int], int] | None,
        clock: Callable[[], float],
    ) -> None:
        self.tracks, self.counters, self.page_size = tracks, tracks.counters, tracks.page_size
        self._sequences: dict[SeqId, SequenceState] = {}
        self._hasher, self._drafts = hasher, num_draft_tokens
        self._bytes_for_pages, self._clock = bytes_for_pages, clock

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._sequences

    def claim(
        self, seq_id: SeqId, tokens: Iterable[int] | None, salt: bytes, names: Sequence[Hashable] | None, priority: int
    ) -> None:
        """Begin a sequence; every page whose ids are known is named at once."""
        if seq_id in self._sequences:
            raise in_use(seq_id)
        ids = None if tokens is None else token_ids(tokens)
        pages = [SequencePages() for _ in self.tracks.all]
        state = SequenceState(seq_id, self.page_size, pages, ids, list(names or ()), priority=priority)
        if self._hasher is not None and ids is not None and names is None:
            state.root = self._hasher.root(salt)
            state.named(len(ids) // self.page_size, self._hasher)
        state.measure()
        self._sequences[seq_id] = state

    def extend(self, seq_id: SeqId, ids: array[int]) -> None:
        """Add ids."""
        state = self._state(seq_id)
        if state.ids is None:
            raise without_ids(seq_id)
        state.ids += ids

    def alloc(self, seq_id: SeqId, num_new_tokens: int, lookahead: int) -> Allocation:
        """Find a prefix, then make room."""
        state = self._state(seq_id)
        target, before = state.length + num_new_tokens, state.length
        hit_end, plans, beginning = self._plan(state, num_new_tokens, lookahead)
        new_pages = self._change([(state, plans)])
        copies: tuple[PageCopy, ...] = ()
        if hit_end * self.page_size > before:
            state.closed, state.length = hit_end, hit_end * self.page_size
        if beginning is not None:
            state.length = hit_end * self.page_size + beginning.num_tokens
            copies = self.tracks.copies(state, hit_end, beginning.page)
        if state.length > before:
            state.final = state.length
            self.counters.cache_tokens += state.length - before
        self._count_input(state, target)
        return Allocation(state.length - before, state.length, new_pages, copies)

    def alloc_batch(
        self, seq_ids: Sequence[SeqId], num_new_tokens: int, ids: array[int] | None, lookahead: int
    ) -> tuple[PageRun, ...]:
        """Make room for several sequences, or for none; then add an id to each."""
        states = self._states(seq_ids)
        check_counts(num_new_tokens, lookahead)
        reach = num_new_tokens + lookahead
        changes = []
        for state in states:
            if state.length + reach > state.capacity:
                target = state.length + num_new_tokens
                changes.append((state, self._plan_to(state, target, lookahead, state.closed, self.tracks.no_hits)))
        runs = self._change(changes) if changes else ()
        for state, token in zip(states, ids or repeat(0), strict=False):
            if ids is not None and state.ids is not None:
                state.ids.append(token)
            target = state.length + num_new_tokens
            if target > state.counted:
                self.counters.input_tokens += target - state.counted
                state.counted = target
        return runs

    def commit(self, seq_ids: Sequence[SeqId], num_tokens: int, num_drafts: int | None) -> Commit:
        """Count tokens as stored for several sequences, or for none; close what is final."""
        states, drafts = self._states(seq_ids), self._drafts if num_drafts is None else num_drafts
        check_counts(num_tokens, drafts)
        size, windowed, closing = self.page_size, self.tracks.windowed, list[SequenceState]()
        for state in states:
            length = state.length + num_tokens
            if length > state.capacity or windowed or (state.ids is not None and length > len(state.ids)):
                self._check_commit(state, length, drafts)
        for state in states:
            state.length = length = state.length + num_tokens
            if length - drafts > state.final:
                state.final = length - drafts
                if windowed or state.final >= (state.closed + 1) * size:
                    closing.append(state)
        return self.tracks.close(closing, self._hasher, self._clock()) if closing else _NOTHING

    def count_copied(self, num_tokens: int) -> None:
        """Count tokens as cached that were counted as input."""
        self.counters.input_tokens -= num_tokens
        self.counters.cache_tokens += num_tokens

    def truncate(self, seq_id: SeqId, length: int) -> None:
        """Take back tokens of open pages, or closed pages as a whole."""
        state = self._state(seq_id)
        check_cut(seq_id, state.length, state.closed, self.page_size, length)
        if not self.tracks.sees(state, length, length):
            raise ValueError(
                f"cannot cut sequence {seq_id!r} of {state.length} tokens to {length}: a window has moved on past it"
            )
        self.tracks.cut(state, length)
        state.cut(length)

    def fork(self, parent: SeqId, child: SeqId) -> tuple[PageCopy, ...]:
        """Begin a copy of a sequence."""
        state = self._state(parent)
        if child in self._sequences:
            raise in_use(child)
        plans = self.tracks.plan_fork(state)
        self._afford([(state, plans)])
        copies = self.tracks.fork(state, plans, self._clock())
        self._sequences[child] = state.copy(child, [plan.held for plan in plans])
        return copies

    def release(self, seq_id: SeqId, head_first: bool) -> None:
        """End a sequence."""
        state = self._state(seq_id)
        del self._sequences[seq_id]
        for track, held in zip(self.tracks.all, state.pages, strict=True):
            track.drop(held.pages if head_first or self._hasher is None else held.pages[::-1])

    def forecast(self, seq_id: SeqId, num_new_tokens: int, lookahead: int) -> Forecast:
        """What alloc would do."""
        state = self._state(seq_id)
        hit_end, plans, beginning = self._plan(state, num_new_tokens, lookahead)
        pages = [
            plan.fresh + track.pool.count_free(plan.hits) for track, plan in zip(self.tracks.all, plans, strict=True)
        ]
        reached = hit_end * self.page_size + (beginning.num_tokens if beginning else 0)
        return Forecast(max(0, reached - state.length), sum(pages), self.tracks.lacking([(state, plans)]) is None)

    def length(self, seq_id: SeqId) -> int:
        """Tokens stored."""
        return self._state(seq_id).length

    def room(self, seq_id: SeqId) -> int:
        """Slots beyond the tokens stored."""
        state = self._state(seq_id)
        return state.capacity - state.length

    def table(self, seq_id: SeqId, group: int) -> PageTable:
        """Pages of a sequence in one group."""
        state = self._state(seq_id)
        if group not in self.tracks.of_group:
            return PageTable(0, ())
        held = state.pages[self.tracks.of_group[group]]
        return PageTable(held.first, tuple(held.pages))

    def page_names(self, seq_id: SeqId, num_new_tokens: int) -> tuple[Hashable, ...]:
        """Names of pages beyond those that are stored in full, as far as alloc would look for them."""
        state = self._state(seq_id)
        return tuple(self._wanted(state, state.length + num_new_tokens)[state.length // self.page_size :])

    def num_closed(self, seq_id: SeqId) -> int:
        """How many pages are closed."""
        return self._state(seq_id).closed

    def closed_pages(self, seq_id: SeqId) -> Held:
        """Pages that are closed, of each pool."""
        state = self._state(seq_id)
        return [held.pages[: max(state.closed - held.first, 0)] for held in state.pages]

    def find(self, page_names: Sequence[Hashable]) -> Held:
        """Pages of the longest run of names, of each pool; none where windows would need pages of their own."""
        return [[] if self.tracks.windowed else track.index.run(page_names) for track in self.tracks.all]

    def num_cached(self, page_names: Sequence[Hashable]) -> int:
        """Pages of the longest run of names, in the groups that grow."""
        return max([len(track.index.run(page_names)) for track in self.tracks.all if not track.windowed], default=0)

    def hold(self, held: Held) -> None:
        """Add a reference to pages that are cached or in use."""
        for track, pages in zip(self.tracks.all, held, strict=True):
            track.hold(pages)

    def drop(self, held: Held) -> None:
        """Take a reference away, the last pages first."""
        for track, pages in zip(self.tracks.all, held, strict=True):
            track.drop(pages[::-1])

    def forget_unused(self) -> int:
        """Take the names away from pages that nothing refers to."""
        return sum([track.forget_unused() for track in self.tracks.all])

    def metrics(self) -> LedgerMetrics:
        """The counters as they are now."""
        tracks, counters = self.tracks.all, self.counters
        return LedgerMetrics(
            num_pages=sum(track.pool.num_pages for track in tracks),
            used_pages=sum(track.pool.num_pages - track.pool.num_free for track in tracks),
            cached_pages=sum(len(track.index) for track in tracks),
            evictable_pages=sum(track.evictable for track in tracks),
            input_tokens=counters.input_tokens,
            cache_tokens=counters.cache_tokens,
            evictions=counters.evictions,
            refusals=counters.refusals,
            page_lifetimes=dict(sorted(counters.lifetimes.items())),
        )

    def reset_metrics(self) -> None:
        """Count from zero again."""
        self.counters.reset()

    def check_integrity(self, pins: Iterable[Held]) -> None:
        """Recount everything from sequences and pins.

        Raises:
            AssertionError: if something disagrees.
        """
        self.tracks.check_integrity(self._sequences.values(), pins)

    def _state(self, seq_id: SeqId) -> SequenceState:
        state = self._sequences.get(seq_id)
        if state is None:
            raise unclaimed(seq_id)
        return state

    def _states(self, seq_ids: Sequence[SeqId]) -> list[SequenceState]:
        try:
            states = [self._sequences[seq_id] for seq_id in seq_ids]
        except KeyError as error:
            raise unclaimed(error.args[0]) from None
        if len(set(seq_ids)) < len(states):
            raise ValueError("a sequence is named twice in one batch")
        return states

    def _wanted(self, state: SequenceState, target: int) -> Sequence[Hashable]:
        """Names of the sequence's pages that may be found on the way to `target` tokens; the last one is computed."""
        if self._hasher is None:
            return ()
        limit = (target if state.root is None else target - 1) // self.page_size
        return state.named(limit, self._hasher)

    def _plan(self, state: SequenceState, num_new_tokens: int, lookahead: int) -> _Intent:
        check_counts(num_new_tokens, lookahead)
        target = state.length + num_new_tokens
        hit_end, hits = state.closed, self.tracks.no_hits
        if num_new_tokens > 1 and (names := self._wanted(state, target)):
            hit_end, hits = self.tracks.find(state, names)
        plans = self._plan_to(state, target, lookahead, hit_end, hits)
        beginning = self.tracks.beginning(state, hit_end, target - 1) if num_new_tokens > 1 else None
        if beginning is not None:
            guarded = [plan._replace(guarded=[beginning.page]) for plan in plans]
            if self.tracks.lacking([(state, guarded)]) is None:
                return _Intent(hit_end, guarded, beginning)
        return _Intent(hit_end, plans)

    def _plan_to(
        self, state: SequenceState, target: int, lookahead: int, hit_end: int, hits: list[list[int]]
    ) -> list[PagePlan]:
        final = hit_end * self.page_size if hit_end > state.closed else state.final
        earliest = target - self._drafts
        return self.tracks.plan(state, hit_end, hits, target + lookahead, earliest if earliest > final else final)

    def _change(self, changes: Changes) -> tuple[PageRun, ...]:
        self._afford(changes)
        return self.tracks.apply(changes, self._clock())

    def _afford(self, changes: Changes) -> None:
        lacking = self.tracks.lacking(changes)
        if lacking is not None:
            self.counters.refusals += 1
            raise self.tracks.shortage(changes, lacking, len(self._sequences)).error(self._bytes_for_pages)

    def _check_commit(self, state: SequenceState, length: int, drafts: int) -> None:
        check_commit(state.seq_id, length, state.capacity, None if state.ids is None else len(state.ids))
        if not self.tracks.sees(state, max(state.final, length - drafts), length):
            raise ValueError(
                f"cannot commit sequence {state.seq_id!r} up to {length} tokens: a windowed group stored only what is "
                "seen after all that was allocated"
            )

    def _count_input(self, state: SequenceState, target: int) -> None:
        seen = max(state.counted, state.length)
        self.counters.input_tokens += max(0, target - seen)
        state.counted = max(seen, target)
