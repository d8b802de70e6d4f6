"""One pool of pages, the groups that share it, and what part of a sequence it has to keep."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kvcfg.cache.beginnings import Beginnings
from kvcfg.cache.index import PageIds, PrefixIndex
from kvcfg.cache.metrics import LedgerCounters
from kvcfg.cache.pages import PageGroup
from kvcfg.cache.pool import PagePool
from kvcfg.cache.sequence import SequencePages, SequenceState
from kvcfg.units import ceil_div


class PagePlan(NamedTuple):
    """How the pages of one sequence in one pool are about to change.

    Attributes:
        held: the pages to change.
        first: index of the first page afterwards.
        kept: own pages that stay; `held.pages` itself if all do.
        hits: cached pages that follow them.
        unstored: pages after those that get no storage: no query after the coming commit will see them.
        fresh: new pages after those.
        dropped: own pages that are given up.
        guarded: cached pages that are copied from, so that they must not be among the new ones.
    """

    held: SequencePages
    first: int
    kept: list[int]
    hits: list[int]
    unstored: int
    fresh: int
    dropped: list[int]
    guarded: list[int]

    @property
    def found(self) -> list[int]:
        """Cached pages that the change relies on."""
        return self.hits + self.guarded


Closing = tuple[SequenceState, SequencePages, int, Sequence[Hashable]]
"""A sequence, its pages, the index up to which they are to be closed, and the names of its pages that are known."""


class Closed(NamedTuple):
    """Pages of a sequence that were closed.

    Attributes:
        sequence: the sequence.
        held: all its pages.
        first: index of the first one that was closed.
        pages: those that were closed.
        moved: (index, page) where another page had the content already and is used instead.
    """

    sequence: SequenceState
    held: SequencePages
    first: int
    pages: list[int]
    moved: list[tuple[int, int]]


class PageTrack:
    """A pool, its index, and the layer groups whose pages have the same ids.

    Args:
        groups: indices of the groups.
        group: one of them; what it says of windows holds for all.
        num_pages: pages of the pool. The next id is the null page, which stands for pages without storage.
        page_size: tokens in a page.
        eviction: the pool's eviction policy.
        verify: whether token ids are compared before a cached page is trusted.
        keeps_beginnings: whether cached pages can be found by their first tokens.

    Attributes:
        beginnings: cached pages by their first tokens; None if they are not kept.
        evictable: cached pages without a reference.
    """

    def __init__(
        self,
        groups: tuple[int, ...],
        group: PageGroup,
        num_pages: int,
        page_size: int,
        eviction: str,
        verify: bool,
        keeps_beginnings: bool,
    ) -> None:
        self.groups, self.group, self.page_size, self.null_page = groups, group, page_size, num_pages
        self.index = PrefixIndex(num_pages, verify=verify)
        self.pool = PagePool(num_pages, self.index.keys, eviction)
        self.beginnings = Beginnings() if keeps_beginnings else None
        self.windowed = group.window is not None
        self.evictable = 0

    def first_visible(self, position: int) -> int:
        """Index of the first page that a query at `position` can see."""
        window = self.group.window
        if window is None:
            return 0
        token = position // window * window if self.group.kind == "chunked" else max(0, position - window + 1)
        return token // self.page_size

    def longest_hit(
        self, names: Sequence[Hashable], held: SequencePages, start: int, limit: int, ids: PageIds | None
    ) -> int:
        """After how many pages, at most, a sequence can go on with what its window sees being cached or its own.

        Args:
            names: names of the sequence's pages from its start.
            held: the pages it has.
            start: closed pages; they are its own already.
            limit: the most pages that may be found.
            ids: token ids to compare with, if known.

        Returns:
            A number of pages in `[start, limit]`; `start` if nothing is found.
        """
        end, page = limit, limit - 1
        while end > start:
            seen = self.first_visible(end * self.page_size)
            if page < max(seen, start):
                own = held.pages[max(seen - held.first, 0) : max(start - held.first, 0)]
                whole = seen >= start or (seen >= held.first and self.null_page not in own)
                return end if whole else start
            if not self.index.run(names[page : page + 1], page, ids):
                end = page
            page -= 1
        return start

    def plan(
        self,
        sequence: SequenceState,
        held: SequencePages,
        hit_end: int,
        hits: list[int],
        slots: int,
        next_query: int,
        trim: bool,
    ) -> PagePlan:
        """How to cover a sequence up to `slots` tokens.

        Args:
            sequence: the sequence.
            held: the pages it has.
            hit_end: index of the page after the last hit; the number of closed pages if there is none.
            hits: cached pages that end there. They follow closed pages, or begin where the window does.
            slots: tokens to have slots for.
            next_query: position of the earliest query after the coming commit.
            trim: whether pages that only queries before that one see are given up at once.
        """
        first, kept, end = held.first, held.pages, held.end
        dropped: list[int] = []
        if not self.windowed:
            if hit_end > sequence.closed:
                kept, dropped, end = held.pages[: sequence.closed], held.pages[sequence.closed :], hit_end
            return PagePlan(held, 0, kept, hits, 0, max(0, ceil_div(slots, self.page_size) - end), dropped, [])
        if hit_end > sequence.closed:
            begin = hit_end - len(hits)
            seen = self.first_visible(hit_end * self.page_size)
            kept = held.pages[max(seen - first, 0) : max(sequence.closed - first, 0)]
            stay = range(max(seen, first), sequence.closed)
            dropped = [page for place, page in enumerate(held.pages, first) if place not in stay]
            first, end = (stay.start if kept else begin), hit_end
        keep = self.first_visible(next_query)
        if trim and keep > first and not hits:
            dropped, kept = dropped + kept[: keep - first], kept[keep - first :]
            first, end = keep, max(end, keep)
        if not kept and not hits:
            first = end = max(end, keep)
        unstored = max(0, keep - end)
        fresh = max(0, ceil_div(slots, self.page_size) - end - unstored)
        return PagePlan(held, first, kept, hits, unstored, fresh, dropped, [])

    def give_up(self, plan: PagePlan) -> None:
        """First half of a plan that fits: take hold of hits, let go of dropped pages."""
        if plan.hits:
            self.evictable -= self.pool.hold(plan.hits)
            if self.pool.weighs:
                self.pool.hit(plan.hits)
        if plan.guarded:
            self.hold(plan.guarded)
        if plan.dropped:
            self.drop(plan.dropped[::-1])

    def fill(self, plan: PagePlan, fresh: list[int]) -> tuple[int, list[int]]:
        """Second half, with its new pages; the index of the first changed page, and the pages from there on."""
        added = fresh
        if plan.hits or plan.unstored:
            added = plan.hits + [self.null_page] * plan.unstored + fresh
        held = plan.held
        held.first = plan.first
        if plan.kept is not held.pages:
            held.pages = plan.kept
        changed = held.first + len(held.pages)
        held.pages += added
        return changed, added

    def take(self, count: int, counters: LedgerCounters, now: float) -> list[int]:
        """New pages with one reference; what they held is forgotten. As many must be free."""
        pages = self.pool.take(count)
        births = self.index.forget(pages) if pages else None
        if births:
            if self.beginnings is not None:
                self.beginnings.forget(pages)
            self.evictable -= len(births)
            counters.evicted(births, now)
        return pages

    def hold(self, pages: list[int]) -> None:
        """Add a reference to pages that are cached or in use, each named once."""
        self.evictable -= self.pool.hold(self.stored(pages))

    def drop(self, pages: list[int]) -> None:
        """Take away a reference; those without one wait, the first of them first, to be handed out."""
        freed = self.pool.drop(self.stored(pages) if self.windowed else pages)
        keys = self.index.keys
        self.evictable += len(freed) - [keys[page] for page in freed].count(None)

    def close(self, closing: Iterable[Closing], now: float) -> list[Closed]:
        """Give the pages of some sequences, from their closed ones up to an end, the names that are known for them.

        Where a page of that name is cached already, a sequence goes on with that one and drops its own.
        """
        closed, pages, keys = list[Closed](), list[int](), list[Hashable]()
        contents = list[bytes]() if self.index.verifies else None
        for sequence, held, end, names in closing:
            first = max(sequence.closed, held.first)
            span = held.pages[first - held.first : end - held.first]
            closed.append(Closed(sequence, held, first, span, []))
            named: Sequence[int] = range(first, min(end, len(names)))
            if self.windowed:
                named = [place for place in named if span[place - first] != self.null_page]
                pages += [span[place - first] for place in named]
                keys += [names[place] for place in named]
            else:
                pages += span[: len(named)]
                keys += names[first : first + len(named)]
            if contents is not None:
                ids = sequence.page_ids()
                contents += [b"" if ids is None else ids(place) for place in named]
        owners = self.index.name(pages, keys, now, contents)
        if self.beginnings is not None:
            self._keep_beginnings(self.beginnings, closed)
        swaps = {} if owners == pages else dict(pair for pair in zip(pages, owners, strict=True) if pair[0] != pair[1])
        for item in closed if swaps or self.pool.weighs else ():
            own = [page for page in self.stored(item.pages) if page not in swaps]
            self.pool.cached(own, item.sequence.priority)
            self._adopt(item, swaps)
        return closed

    def _keep_beginnings(self, beginnings: Beginnings, closed: list[Closed]) -> None:
        """Let the pages that have just got their name be found by their first tokens."""
        for sequence, _, first, pages, _ in closed:
            ids = sequence.page_ids()
            for place, page in enumerate(pages, first):
                if ids is not None and sequence.root is not None and self.index.keys[page] == sequence.names[place]:
                    beginnings.add(page, sequence.parent(place), ids(place))

    def _adopt(self, closed: Closed, swaps: Mapping[int, int]) -> None:
        """Go on with the pages that had the names before."""
        for place, page in enumerate(closed.pages):
            owner = swaps.get(page)
            if owner is not None:
                self.hold([owner])
                self.drop([page])
                closed.pages[place] = owner
                closed.held.pages[closed.first - closed.held.first + place] = owner
                closed.moved.append((closed.first + place, owner))

    def drop_unseen(self, held: SequencePages, position: int) -> tuple[int, list[int]]:
        """Give up pages that no query from `position` on can see; the index of the first one, and the pages."""
        first, count = held.first, min(self.first_visible(position) - held.first, len(held.pages))
        if count <= 0:
            return first, []
        dropped = held.pages[:count]
        del held.pages[:count]
        held.first += count
        self.drop(dropped)
        return first, dropped

    def stored(self, pages: list[int]) -> list[int]:
        """The pages without null pages, which only a windowed pool uses."""
        return [page for page in pages if page != self.null_page] if self.windowed else pages

    def forget_unused(self) -> int:
        """Take the names away from pages that nothing refers to; how many had one."""
        unused = [page for page in self.index.pages() if not self.pool.references(page)]
        self.index.forget(unused)
        if self.beginnings is not None:
            self.beginnings.forget(unused)
        self.pool.requeue()
        self.evictable = 0
        return len(unused)

    def check_integrity(self, references: list[int]) -> None:
        """Compare pool and index with all references to this pool's pages, one page id for each.

        Raises:
            AssertionError: if they disagree.
        """
        counted = [0] * self.null_page
        for page in self.stored(references):
            counted[page] += 1
        self.pool.check_integrity(counted)
        self.index.check_integrity()
        evictable = sum(not counted[page] for page in self.index.pages())
        assert self.evictable == evictable, f"{self.evictable} pages counted evictable, {evictable} are"
