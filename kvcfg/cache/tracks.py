"""All pools of a replica as one: a change fits in every pool, or none of them changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from kvcfg.cache.beginnings import Beginning
from kvcfg.cache.metrics import LedgerCounters
from kvcfg.cache.pages import GROWING, WINDOWED, Commit, PageCopy, PageGroup, PageRun
from kvcfg.cache.prefix import PageHasher
from kvcfg.cache.refusal import Shortage
from kvcfg.cache.sequence import SequencePages, SequenceState
from kvcfg.cache.track import PagePlan, PageTrack
from kvcfg.units import ceil_div

Changes = list[tuple[SequenceState, list[PagePlan]]]
"""For some sequences, how their pages in each pool are about to change."""


class PageTracks:
    """The pools of one replica and the sequences' pages in them.

    Args:
        groups: the layer groups.
        num_pages: pages of the pool that growing groups share.
        page_size: tokens in a page.
        eviction: eviction policy of every pool.
        verify: whether token ids are compared before a cached page is trusted.
        reads_first: whether pages that only the current step sees are given up before it is stored.
        keeps_beginnings: whether cached pages can be found by their first tokens; windowed pools cannot do with
            part of a window, so that with one among them none is kept.
        counters: where evictions are counted.
    """

    def __init__(
        self,
        groups: Sequence[PageGroup],
        num_pages: int,
        page_size: int,
        eviction: str,
        *,
        verify: bool,
        reads_first: bool,
        keeps_beginnings: bool,
        counters: LedgerCounters,
    ) -> None:
        self.groups, self.page_size, self.reads_first, self.counters = tuple(groups), page_size, reads_first, counters
        growing = tuple(place for place, group in enumerate(groups) if group.kind in GROWING)
        shares = [(growing, num_pages)] if growing else []
        shares += [((place,), group.num_pages or 0) for place, group in enumerate(groups) if group.kind in WINDOWED]
        self.windowed = len(shares) > bool(growing)
        keeps_beginnings = keeps_beginnings and not self.windowed
        self.all = [
            PageTrack(places, groups[places[0]], pages, page_size, eviction, verify, keeps_beginnings)
            for places, pages in shares
        ]
        self._verifies = verify
        self.no_hits: list[list[int]] = [[] for _ in self.all]
        self.of_group = {place: number for number, track in enumerate(self.all) for place in track.groups}

    def find(self, state: SequenceState, names: Sequence[Hashable]) -> tuple[int, list[list[int]]]:
        """The longest prefix after which a sequence can go on in every pool.

        Args:
            state: the sequence.
            names: names of those of its pages, from its start, that may be found.

        Returns:
            Index of the page after the last hit (the closed pages if there is none), and per pool the cached
            pages up to there.
        """
        start, ids = state.closed, state.page_ids() if self._verifies else None
        end, run = len(names), list[int]()
        for track in self.all:
            if not track.windowed and end > start:
                run = track.index.run(names[start:] if start else names, start, ids)
                end = start + len(run)
        if self.windowed:
            end = self._agreed(state, names, start, end)
        if end <= start or end * self.page_size <= state.length:
            return start, self.no_hits
        if not self.windowed:
            return end, [run]
        return end, [
            track.index.run(names[max(start, track.first_visible(end * self.page_size)) : end])
            if track.windowed
            else run[: end - start]
            for track in self.all
        ]

    def _agreed(self, state: SequenceState, names: Sequence[Hashable], start: int, end: int) -> int:
        """The longest prefix up to `end` for which every window finds what it sees."""
        windows = [pair for pair in zip(self.all, state.pages, strict=True) if pair[0].windowed]
        ids, longest = state.page_ids(), -1
        while windows and end > start and end != longest:
            longest = end
            for track, held in windows:
                end = track.longest_hit(names, held, start, end, ids)
        return end

    def beginning(self, state: SequenceState, hit_end: int, limit: int) -> Beginning | None:
        """A cached page whose first tokens are those of a sequence's page `hit_end`, if that gets it further.

        Args:
            state: the sequence.
            hit_end: the page after its last hit, or after its closed ones.
            limit: position of the first token that must not be found.
        """
        start, kept = hit_end * self.page_size, self.all[0].beginnings if self.all else None
        if kept is None or state.ids is None or state.root is None:
            return None
        ids = state.ids[start : min(limit, start + self.page_size)]
        found = kept.longest(state.parent(hit_end), ids.tobytes())
        return found if found is not None and start + found.num_tokens > state.length else None

    def plan(
        self, state: SequenceState, hit_end: int, hits: list[list[int]], slots: int, next_query: int
    ) -> list[PagePlan]:
        """How to cover a sequence up to `slots` tokens in every pool; see `PageTrack.plan`."""
        return [
            track.plan(state, held, hit_end, found, slots, next_query, self.reads_first)
            for track, held, found in zip(self.all, state.pages, hits, strict=True)
        ]

    def lacking(self, changes: Changes) -> int | None:
        """The first pool in which these changes do not fit together, if there is one."""
        for number, track in enumerate(self.all):
            needed = 0
            for _, plans in changes:
                plan = plans[number]
                needed += plan.fresh + len(plan.hits) + len(plan.guarded)
            if needed > track.pool.num_free:  # unless hits are in use by others, or pages are given up
                needed, free = self._needed_and_free(track, [plans[number] for _, plans in changes])
                if needed > free:
                    return number
        return None

    def shortage(self, changes: Changes, number: int, sequences: int) -> Shortage:
        """What is said of a pool in which these changes do not fit; `sequences` are claimed in all."""
        track, plans = self.all[number], [plans[number] for _, plans in changes]
        needed, free = self._needed_and_free(track, plans)
        return Shortage(
            asking=[state.seq_id for state, _ in changes],
            groups=[self.groups[place].name for place in track.groups],
            windowed=track.windowed,
            page_size=self.page_size,
            num_pages=track.pool.num_pages,
            free=free,
            evictable=track.evictable - sum([track.pool.count_free(plan.found) for plan in plans]),
            needed=needed,
            in_all=sum([len(plan.kept) + len(plan.hits) + plan.fresh for plan in plans]),
            sequences=sequences,
        )

    def _needed_and_free(self, track: PageTrack, plans: list[PagePlan]) -> tuple[int, int]:
        """New pages that plans need of one pool, and those that are free for them once hits and drops are done."""
        pool = track.pool
        free = pool.num_free - sum([pool.count_free(plan.found) for plan in plans])
        needed = sum([plan.fresh for plan in plans])
        if needed > free:
            given_up = Counter([page for plan in plans for page in track.stored(plan.dropped)])
            free += sum([pool.references(page) == drops for page, drops in given_up.items()])
        return needed, free

    def apply(self, changes: Changes, now: float) -> tuple[PageRun, ...]:
        """Carry out changes that fit; the runs of the page tables that are new."""
        runs = list[PageRun]()
        for number, track in enumerate(self.all):
            for _, plans in changes:
                track.give_up(plans[number])
            pages = track.take(sum([plans[number].fresh for _, plans in changes]), self.counters, now)
            used = 0
            for state, plans in changes:
                plan = plans[number]
                if plan.guarded:
                    track.drop(plan.guarded)
                first, added = track.fill(plan, pages[used : used + plan.fresh])
                used += plan.fresh
                if added:
                    runs += _runs(state, track, first, added)
        for state, _ in changes:
            state.measure()
        return tuple(runs)

    def close(self, states: list[SequenceState], hasher: PageHasher | None, now: float) -> Commit:
        """Close the pages of sequences that are full and final, and let go of those that fell out of sight."""
        closed, moved, dropped = list[PageRun](), list[PageRun](), list[PageRun]()
        ends = [state.final // self.page_size for state in states]
        names = [() if hasher is None else state.named(end, hasher) for state, end in zip(states, ends, strict=True)]
        for number, track in enumerate(self.all):
            held = [state.pages[number] for state in states]
            for item in track.close(zip(states, held, ends, names, strict=True), now):
                if item.pages:
                    closed += _runs(item.sequence, track, item.first, item.pages)
                for place, page in item.moved:
                    moved += _runs(item.sequence, track, place, [page])
                if track.windowed:
                    first, pages = track.drop_unseen(item.held, item.sequence.final)
                    if pages:
                        dropped += _runs(item.sequence, track, first, pages)
        for state, end in zip(states, ends, strict=True):
            state.closed = end
        return Commit(tuple(closed), tuple(moved), tuple(dropped))

    def sees(self, state: SequenceState, position: int, length: int) -> bool:
        """Whether all that a query at `position` sees of the first `length` tokens is stored."""
        end = ceil_div(length, self.page_size)
        for track, held in zip(self.all, state.pages, strict=True):
            if track.windowed:
                seen = track.first_visible(position)
                if seen < held.first or track.null_page in held.pages[seen - held.first : max(end - held.first, 0)]:
                    return False
        return True

    def cut(self, state: SequenceState, length: int) -> None:
        """Give up the pages after those that hold the first `length` tokens, the last one first."""
        end = ceil_div(length, self.page_size)
        for track, held in zip(self.all, state.pages, strict=True):
            surplus = held.pages[max(end - held.first, 0) :]
            if surplus:
                del held.pages[-len(surplus) :]
                track.drop(surplus[::-1])

    def copies(self, state: SequenceState, place: int, source: int) -> tuple[PageCopy, ...]:
        """What fills a sequence's page `place` from another page of its pool, in every group."""
        (track,), (held,) = self.all, state.pages
        return tuple([PageCopy(group, source, held.pages[place]) for group in track.groups])

    def plan_fork(self, state: SequenceState) -> list[PagePlan]:
        """New pages for the open ones of a sequence; its closed ones are kept, to be shared."""
        end = ceil_div(state.length, self.page_size)
        plans = []
        for held in state.pages:
            shared = held.pages[: max(state.closed - held.first, 0)]
            opened = max(0, end - held.first - len(shared))
            plans.append(PagePlan(SequencePages(held.first, shared), held.first, shared, [], 0, opened, [], []))
        return plans

    def fork(self, state: SequenceState, plans: list[PagePlan], now: float) -> tuple[PageCopy, ...]:
        """Carry out the plans of a fork; the pages to copy."""
        copies = list[PageCopy]()
        for track, held, plan in zip(self.all, state.pages, plans, strict=True):
            track.hold(plan.kept)
            first, targets = track.fill(plan, track.take(plan.fresh, self.counters, now))
            sources = held.pages[first - held.first :]
            copies += [
                PageCopy(group, source, target)
                for group in track.groups
                for source, target in zip(sources, targets, strict=False)
            ]
        return tuple(copies)

    def check_integrity(self, states: Iterable[SequenceState], pins: Iterable[list[list[int]]]) -> None:
        """Recount all pools from sequences and pins.

        Raises:
            AssertionError: if something disagrees, or a page that a sequence may write has another holder or a name.
        """
        states, pins = list(states), list(pins)
        for state in states:
            state.check_integrity()
        for number, track in enumerate(self.all):
            held = [page for state in states for page in state.pages[number].pages]
            track.check_integrity(held + [page for pin in pins for page in pin[number]])
            for state in states:
                item = state.pages[number]
                for page in track.stored(item.pages[max(state.closed - item.first, 0) :]):
                    assert track.pool.references(page) == 1, f"open page {page} of {state.seq_id!r} has another holder"
                    assert track.index.keys[page] is None, f"open page {page} of {state.seq_id!r} can be found"


def _runs(state: SequenceState, track: PageTrack, first: int, pages: list[int]) -> list[PageRun]:
    held = tuple(pages)
    return [PageRun(state.seq_id, group, first, held) for group in track.groups]
