"""What each call of the ledger does to its sequences: everything is checked first, then done."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from itertools import repeat

from kvcfg.cache.pages import Allocation, Commit, Forecast, PageCopy, PageRun, SeqId
from kvcfg.cache.prefix import PageHasher
from kvcfg.cache.sequence import SequenceState
from kvcfg.cache.track import PagePlan
from kvcfg.cache.tracks import Changes, PageTracks

_NOTHING = Commit()


class LedgerSteps:
    """The rules of one replica; the caller keeps others out while a method runs.

    Args:
        tracks: all pools.
        hasher: names pages; None = no prefix cache.
        num_draft_tokens: tokens of a commit that may be taken back.
        bytes_for_pages: memory that a number of pages would take, for errors.
        clock: seconds.

    Attributes:
        sequences: the claimed sequences by name.
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
        self.sequences: dict[SeqId, SequenceState] = {}
        self._hasher, self._drafts = hasher, num_draft_tokens
        self._bytes_for_pages, self._clock = bytes_for_pages, clock

    def alloc(self, state: SequenceState, num_new_tokens: int, lookahead: int) -> Allocation:
        """Find a prefix, then make room."""
        target = state.length + num_new_tokens
        hit_end, plans = self._plan(state, num_new_tokens, lookahead)
        new_pages = self._change([(state, plans)])
        cached = max(0, hit_end * self.page_size - state.length)
        if cached:
            state.closed, state.length, state.final = hit_end, state.length + cached, state.length + cached
            self.counters.cache_tokens += cached
        self._count_input(state, target)
        return Allocation(cached, state.length, new_pages)

    def alloc_batch(
        self, states: list[SequenceState], num_new_tokens: int, ids: array[int] | None, lookahead: int
    ) -> tuple[PageRun, ...]:
        """Make room for several sequences, or for none; then add an id to each."""
        _check_counts(num_new_tokens, lookahead)
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

    def commit(self, states: list[SequenceState], num_tokens: int, num_drafts: int | None) -> Commit:
        """Count tokens as stored for several sequences, or for none; close what is final."""
        drafts = self._drafts if num_drafts is None else num_drafts
        _check_counts(num_tokens, drafts)
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

    def truncate(self, state: SequenceState, length: int) -> None:
        """Take back tokens that nobody else relies on."""
        cannot = f"cannot cut sequence {state.seq_id!r} of {state.length} tokens to {length}"
        if not 0 <= length <= state.length:
            raise ValueError(f"{cannot}: must be between 0 and {state.length}")
        if length < state.closed * self.page_size and not self.tracks.can_reopen(state, length):
            raise ValueError(f"{cannot}: the page there is cached or shared, so it cannot be opened again")
        if not self.tracks.sees(state, length, length):
            raise ValueError(f"{cannot}: a window has moved on past it")
        self.tracks.cut(state, length)
        state.cut(length)

    def fork(self, state: SequenceState, child: SeqId) -> tuple[PageCopy, ...]:
        """Begin a copy of a sequence."""
        plans = self.tracks.plan_fork(state)
        self._afford([(state, plans)])
        copies = self.tracks.fork(state, plans, self._clock())
        self.sequences[child] = state.copy(child, [plan.held for plan in plans])
        return copies

    def release(self, state: SequenceState, head_first: bool) -> None:
        """End a sequence."""
        del self.sequences[state.seq_id]
        for track, held in zip(self.tracks.all, state.pages, strict=True):
            track.drop(held.pages if head_first or self._hasher is None else held.pages[::-1])

    def forecast(self, state: SequenceState, num_new_tokens: int, lookahead: int) -> Forecast:
        """What alloc would do."""
        hit_end, plans = self._plan(state, num_new_tokens, lookahead)
        pages = [
            plan.fresh + track.pool.count_free(plan.hits) for track, plan in zip(self.tracks.all, plans, strict=True)
        ]
        fits = self.tracks.lacking([(state, plans)]) is None
        return Forecast(max(0, hit_end * self.page_size - state.length), sum(pages), fits)

    def open_names(self, state: SequenceState, num_new_tokens: int) -> tuple[Hashable, ...]:
        """Names of pages beyond those that are stored in full, as far as alloc would look for them."""
        return tuple(self._wanted(state, state.length + num_new_tokens)[state.length // self.page_size :])

    def _wanted(self, state: SequenceState, target: int) -> Sequence[Hashable]:
        """Names of the sequence's pages that may be found on the way to `target` tokens; the last one is computed."""
        if self._hasher is None:
            return ()
        limit = (target if state.root is None else target - 1) // self.page_size
        return state.named(limit, self._hasher)

    def _plan(self, state: SequenceState, num_new_tokens: int, lookahead: int) -> tuple[int, list[PagePlan]]:
        _check_counts(num_new_tokens, lookahead)
        target = state.length + num_new_tokens
        hit_end, hits = state.closed, self.tracks.no_hits
        if num_new_tokens > 1 and (names := self._wanted(state, target)):
            hit_end, hits = self.tracks.find(state, names)
        return hit_end, self._plan_to(state, target, lookahead, hit_end, hits)

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
            raise self.tracks.shortage(changes, lacking, len(self.sequences)).error(self._bytes_for_pages)

    def _count_input(self, state: SequenceState, target: int) -> None:
        seen = max(state.counted, state.length)
        self.counters.input_tokens += max(0, target - seen)
        state.counted = max(seen, target)

    def _check_commit(self, state: SequenceState, length: int, drafts: int) -> None:
        cannot = f"cannot commit sequence {state.seq_id!r} up to {length} tokens"
        if length > state.capacity:
            raise ValueError(f"{cannot}: it has slots for {state.capacity}; alloc them first")
        if state.ids is not None and length > len(state.ids):
            raise ValueError(f"{cannot}: ids of {len(state.ids)} are known; extend it first")
        if not self.tracks.sees(state, max(state.final, length - drafts), length):
            raise ValueError(f"{cannot}: a windowed group stored only what is seen after all that was allocated")


def _check_counts(num_tokens: int, num_drafts: int) -> None:
    if num_tokens < 0 or num_drafts < 0:
        raise ValueError(f"numbers of tokens must be at least 0, got {num_tokens} and {num_drafts}")
