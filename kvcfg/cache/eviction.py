"""In which order free pages are handed out again: the eviction policies.

A free page may still hold cached content. Handing it out evicts that content, so the order of the free pages
is the eviction policy:

    lru        longest free first, whether cached or not: one queue
    lfu        pages without content first, then the fewest hits
    fifo       pages without content first, then the longest cached, pages of one commit alike
    priority   pages without content first, then the lowest priority of the sequence that wrote it
    (ties: longest free first)

Entries are not searched for when a page is taken back by a hit. Each time pages become free they get a new
ticket, and an entry counts only while its page still carries that ticket in `state`; stale entries are skipped
later. So every operation costs its own pages, whatever the size of the pool.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Protocol

from kvcfg.registry import Registry

_SLACK = 1024
"""Stale entries that may wait, beyond one per live entry, before all are swept out."""


class FreeOrder(Protocol):
    """Free pages in the order in which they are handed out.

    Args:
        state: per page, references if positive, minus the ticket while free; kept up to date by the owner.
        keys: per page, the name of the cached content or None; kept up to date by the owner.

    Attributes:
        weighs: whether `cached` and `hit` matter.
    """

    weighs: bool

    def __init__(self, state: list[int], keys: Sequence[Hashable | None]) -> None: ...

    def push(self, ticket: int, pages: list[int]) -> None:
        """Pages that have just become free under `ticket`, the first to go first; the list is not copied."""

    def take(self, count: int) -> list[int]:
        """Remove and return the next free pages, `count` of them or all there are."""

    def cached(self, pages: Sequence[int], priority: int) -> None:
        """Pages in use whose content has just been cached."""

    def hit(self, pages: Sequence[int]) -> None:
        """Cached pages that a look-up has just found."""

    def waiting(self) -> list[int]:
        """All free pages, the next one first."""


class LeastRecentlyUsed:
    """One queue: pages leave in the order in which they became free."""

    weighs = False

    def __init__(self, state: list[int], keys: Sequence[Hashable | None]) -> None:
        self._state = state
        self._batches: deque[tuple[int, list[int]]] = deque()
        self._front: list[int] = []  # the batch that is being consumed, in reverse
        self._front_mark = 0
        self._entries = 0
        self._sweep_at = _SLACK

    def push(self, ticket: int, pages: list[int]) -> None:
        self._batches.append((-ticket, pages))
        self._entries += len(pages)
        if self._entries > self._sweep_at:
            self._sweep()

    def take(self, count: int) -> list[int]:
        state = self._state
        taken: list[int] = []
        while (missing := count - len(taken)) > 0:
            if not self._front:
                if not self._batches:
                    break
                self._front_mark, pages = self._batches.popleft()
                self._front = pages[::-1]
            mark, part = self._front_mark, self._front[-missing:]
            del self._front[-missing:]
            self._entries -= len(part)
            taken += [page for page in reversed(part) if state[page] == mark]
        return taken

    def cached(self, pages: Sequence[int], priority: int) -> None:
        """Nothing to note: recency alone counts."""

    def hit(self, pages: Sequence[int]) -> None:
        """Nothing to note: a page that is hit goes to the end of the queue when it is free again."""

    def waiting(self) -> list[int]:
        batches = [(self._front_mark, self._front[::-1]), *self._batches]
        return [page for mark, pages in batches for page in pages if self._state[page] == mark]

    def _sweep(self) -> None:
        """Drop stale entries. The threshold then doubles, so a sweep costs each entry pushed a constant."""
        state, front_mark = self._state, self._front_mark
        self._front = [page for page in self._front if state[page] == front_mark]
        alive = ((mark, [page for page in pages if state[page] == mark]) for mark, pages in self._batches)
        self._batches = deque((mark, pages) for mark, pages in alive if pages)
        self._entries = len(self._front) + sum(len(pages) for _, pages in self._batches)
        self._sweep_at = 2 * self._entries + _SLACK


class _Weighted:
    """Pages without content first, then cached ones from the lightest; of equal weight the longest free."""

    weighs = True

    def __init__(self, state: list[int], keys: Sequence[Hashable | None]) -> None:
        self._state, self._keys = state, keys
        self._weights: dict[int, int] = {}
        self._blank = LeastRecentlyUsed(state, keys)
        self._heap: list[tuple[int, int, int, int]] = []  # weight, age, page, mark
        self._age = 0
        self._sweep_at = _SLACK

    def push(self, ticket: int, pages: list[int]) -> None:
        keys, weights = self._keys, self._weights
        self._blank.push(ticket, [page for page in pages if keys[page] is None])
        for page in pages:
            if keys[page] is not None:
                self._age += 1
                heapq.heappush(self._heap, (weights[page], self._age, page, -ticket))
        if len(self._heap) > self._sweep_at:
            self._heap = self._live()
            heapq.heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + _SLACK

    def take(self, count: int) -> list[int]:
        taken = self._blank.take(count)
        while len(taken) < count and self._heap:
            _, _, page, mark = heapq.heappop(self._heap)
            if self._state[page] == mark:
                taken.append(page)
        return taken

    def cached(self, pages: Sequence[int], priority: int) -> None:
        raise NotImplementedError

    def hit(self, pages: Sequence[int]) -> None:
        """Nothing to note, unless the policy counts hits."""

    def waiting(self) -> list[int]:
        return self._blank.waiting() + [entry[2] for entry in sorted(self._live())]

    def _live(self) -> list[tuple[int, int, int, int]]:
        return [entry for entry in self._heap if self._state[entry[2]] == entry[3]]


class LeastFrequentlyUsed(_Weighted):
    """The fewest hits since it was cached goes first."""

    def cached(self, pages: Sequence[int], priority: int) -> None:
        self._weights.update(dict.fromkeys(pages, 0))

    def hit(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._weights[page] += 1


class FirstCached(_Weighted):
    """The longest cached goes first, however often it was hit; pages of one commit are of one age."""

    def cached(self, pages: Sequence[int], priority: int) -> None:
        self._age += 1
        self._weights.update(dict.fromkeys(pages, self._age))


class LowestPriority(_Weighted):
    """The lowest priority goes first."""

    def cached(self, pages: Sequence[int], priority: int) -> None:
        self._weights.update(dict.fromkeys(pages, priority))


POLICIES = Registry(
    "cache.eviction",
    {
        "lru": f"{__name__}:LeastRecentlyUsed",
        "lfu": f"{__name__}:LeastFrequentlyUsed",
        "fifo": f"{__name__}:FirstCached",
        "priority": f"{__name__}:LowestPriority",
    },
)
"""Eviction policies by name; an entry is a `FreeOrder`."""
