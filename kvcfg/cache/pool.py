"""Page ids and who refers to them: integers only.

Per page one number tells all: how many references it has, or, while it is free, minus the ticket under which
it last became free (0: never used). Never used pages are handed out first, in ascending order; the order of
the others is the eviction policy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from kvcfg.cache.eviction import POLICIES, FreeOrder


class PagePool:
    """References to `num_pages` pages, counted; cost per call depends on the pages named, not on the pool.

    Args:
        num_pages: pages, with ids from 0.
        keys: per page, the name of its cached content or None; read by eviction policies, never written here.
        eviction: a name in `kvcfg.cache.eviction.POLICIES`.

    Attributes:
        num_free: pages without a reference.
        weighs: whether the eviction policy wants to be told by `cached` and `hit`.
    """

    def __init__(self, num_pages: int, keys: Sequence[Hashable | None], eviction: str = "lru") -> None:
        self.num_pages = self.num_free = num_pages
        self._state = [0] * num_pages
        self._order: FreeOrder = POLICIES.load(eviction)(self._state, keys)
        self.weighs = self._order.weighs
        self._unused = 0  # pages from here on were never handed out
        self._ticket = 0

    def references(self, page: int) -> int:
        """How many hold a page; 0 while it is free."""
        return max(self._state[page], 0)

    def take(self, count: int) -> list[int]:
        """Hand out free pages, each with one reference. At least `count` must be free.

        Pages that held cached content are among them; whoever owns that content forgets it.
        """
        assert count <= self.num_free, f"{count} pages taken, {self.num_free} are free"
        first = self._unused
        self._unused = min(first + count, self.num_pages)
        pages = list(range(first, self._unused))
        if len(pages) < count:
            pages += self._order.take(count - len(pages))
        self.num_free -= count
        state = self._state
        for page in pages:
            state[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> int:
        """Add a reference to pages that hold something, free or not; how many were free."""
        state, revived = self._state, 0
        for page in pages:
            references = state[page]
            if references > 0:
                state[page] = references + 1
            else:
                state[page] = 1
                revived += 1
        self.num_free -= revived
        return revived

    def drop(self, pages: Sequence[int]) -> list[int]:
        """Take away a reference from pages, each named once.

        Returns:
            Those left without one. They are free now, and the first of them goes first.
        """
        state = self._state
        freed = [page for page in pages if state[page] == 1]
        if len(freed) < len(pages):
            for page in pages:
                references = state[page]
                if references > 1:
                    state[page] = references - 1
                else:
                    assert references == 1, f"page {page} dropped while free"
        if freed:
            self._ticket += 1
            mark = -self._ticket
            for page in freed:
                state[page] = mark
            self.num_free += len(freed)
            self._order.push(self._ticket, freed)
        return freed

    def count_free(self, pages: Iterable[int]) -> int:
        """How many of these pages are free."""
        state = self._state
        return sum([state[page] <= 0 for page in pages])

    def count_last(self, pages: Iterable[int]) -> int:
        """How many of these pages `drop` would free."""
        state = self._state
        return sum([state[page] == 1 for page in pages])

    def cached(self, pages: Sequence[int], priority: int = 0) -> None:
        """Tell the eviction policy that the content of pages in use has just been cached."""
        self._order.cached(pages, priority)

    def hit(self, pages: Sequence[int]) -> None:
        """Tell the eviction policy that a look-up found these pages."""
        self._order.hit(pages)

    def requeue(self) -> None:
        """Line up the free pages anew, in the order they have, after names of some were taken away."""
        waiting = self._order.waiting()
        self._ticket += 1
        for page in waiting:
            self._state[page] = -self._ticket
        self._order.push(self._ticket, waiting)

    def free_pages(self) -> list[int]:
        """All free pages, the next one first. Costs as much as the pool is large."""
        return [*range(self._unused, self.num_pages), *self._order.waiting()]

    def check_integrity(self, references: Sequence[int]) -> None:
        """Compare with references counted anew, one number per page.

        Raises:
            AssertionError: if they differ, or the free pages are not each in line exactly once.
        """
        held = [max(number, 0) for number in self._state]
        assert held == list(references), "reference counts differ from what the sequences hold"
        free = self.free_pages()
        assert sorted(free) == [page for page, number in enumerate(held) if not number], (
            "a free page is not in line once"
        )
        assert self.num_free == len(free), f"{self.num_free} pages counted free, {len(free)} are"
