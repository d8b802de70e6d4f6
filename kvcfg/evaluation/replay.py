"""What a prefix cache is worth on real traffic: request traces through the engine's own ledger, without a tensor.

`replay_trace` serves a trace with the ledger: any capacity, page size and eviction policy. `LruCurve` finds the
hit rate of lru at every capacity in one pass: a page is found again if the pages used since fit in the cache
with it, so one number per use, its stack distance, answers for all capacities.

    Both serve one request after the other, use its pages from first to last, and find a prefix of them.
    A prompt longer than the cache passes through it in pieces, so its end is what stays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvcfg.cache.ledger import PageLedger
from kvcfg.errors import CapacityError, ConfigError, Problem
from kvcfg.evaluation.traces import PagedRequest


@dataclass(frozen=True, slots=True)
class Replay:
    """What happened to a trace in one cache.

    Attributes:
        page_size: tokens in a page.
        num_pages: capacity; None = unbounded.
        eviction: which cached page went first.
        requests: requests served.
        input_tokens: tokens of their prompts.
        hit_pages: pages that were found in the cache.
        saved_tokens: prompt tokens that were not computed again; at least one of each prompt is.
        evictions: cached pages given up for others.
        peak_pages: most pages in use by requests at one time.
    """

    page_size: int
    num_pages: int | None
    eviction: str
    requests: int
    input_tokens: int
    hit_pages: int
    saved_tokens: int
    evictions: int
    peak_pages: int

    @property
    def hit_rate(self) -> float:
        """Tokens of the pages found, each page counted whole, over the tokens of all prompts."""
        return self.hit_pages * self.page_size / self.input_tokens if self.input_tokens else 0.0


def replay_trace(
    requests: Sequence[PagedRequest],
    page_size: int,
    num_pages: int | None = None,
    *,
    eviction: str = "lru",
    running: int = 1,
) -> Replay:
    """Serve a trace through a ledger of its own.

    Args:
        requests: the trace in pages of `page_size`.
        page_size: tokens in a page.
        num_pages: capacity; None = as many as the trace has.
        eviction: a name in `kvcfg.cache.eviction.POLICIES`.
        running: requests that hold their pages at the same time; fewer while they do not fit.

    Raises:
        ConfigError: if the policy is unknown.
    """
    if num_pages is not None and num_pages < 1:
        raise ConfigError(Problem("num_pages", "must be at least 1", num_pages))
    named = [request.page_names() for request in requests]
    capacity = num_pages or max(1, len({name for names in named for name in names}))
    ledger = PageLedger(capacity, page_size, eviction=eviction)
    held: deque[int] = deque()
    serial = hit_pages = saved_tokens = peak_pages = 0
    for request, names in zip(requests, named, strict=True):
        found = 0
        for start in range(0, len(names), capacity):
            piece = names[start : start + capacity]
            while len(held) >= running:
                ledger.release(held.popleft(), head_first=True)
            serial += 1
            ledger.claim(serial, names=piece)
            cached = _alloc(ledger, serial, len(piece) * page_size, held)
            ledger.commit(serial, len(piece) * page_size - cached)
            held.append(serial)
            found += cached // page_size
            peak_pages = max(peak_pages, ledger.metrics().used_pages)
        hit_pages += found
        saved_tokens += min(found * page_size, max(request.input_tokens - 1, 0))
    return Replay(
        page_size=page_size,
        num_pages=num_pages,
        eviction=eviction,
        requests=len(requests),
        input_tokens=sum([request.input_tokens for request in requests]),
        hit_pages=hit_pages,
        saved_tokens=saved_tokens,
        evictions=ledger.metrics().evictions,
        peak_pages=peak_pages,
    )


def _alloc(ledger: PageLedger, seq_id: int, num_tokens: int, held: deque[int]) -> int:
    """Room for a piece of a prompt, ending older requests if there is none; the tokens found."""
    while True:
        try:
            return ledger.alloc(seq_id, num_tokens).cached_tokens
        except CapacityError:
            if not held:
                raise
            ledger.release(held.popleft(), head_first=True)


class LruCurve:
    """The hit rate of an lru cache as a function of its capacity.

    Args:
        requests: the trace in pages of `page_size`.
        page_size: tokens in a page.

    Attributes:
        page_size: tokens in a page.
        input_tokens: tokens of all prompts.
        unique_pages: different pages of the trace; a cache that large gives up nothing.
    """

    def __init__(self, requests: Sequence[PagedRequest], page_size: int) -> None:
        self.page_size = page_size
        self.input_tokens = sum([request.input_tokens for request in requests])
        self.unique_pages = 0
        hits: Counter[int] = Counter()
        stack = _Recency(sum([len(request.pages) for request in requests]))
        for request in requests:
            deepest = 0
            for name, count in request.pages:
                depth = stack.use(name, count)
                if depth is None:
                    self.unique_pages += count
                    deepest = _NEVER
                elif deepest != _NEVER:
                    deepest = max(deepest, depth)
                    hits[deepest] += count
        self._capacities = sorted(hits)
        self._hit_pages = [0, *accumulate(hits[capacity] for capacity in self._capacities)]

    def hit_pages(self, num_pages: int | None) -> int:
        """Pages found in a cache of that many pages; None = unbounded."""
        if num_pages is None:
            return self._hit_pages[-1]
        return self._hit_pages[bisect_right(self._capacities, num_pages)]

    def hit_rate(self, num_pages: int | None) -> float:
        """Tokens of the pages found, each page counted whole, over the tokens of all prompts."""
        return self.hit_pages(num_pages) * self.page_size / self.input_tokens if self.input_tokens else 0.0

    def corners(self) -> list[tuple[int, float]]:
        """Every capacity, in pages, at which the hit rate rises, and the rate from there on."""
        return [(capacity, self.hit_rate(capacity)) for capacity in self._capacities]


_NEVER = -1


class _Recency:
    """Pages in the order of their last use: a Fenwick tree over the moments of use, weighted by pages."""

    def __init__(self, uses: int) -> None:
        self._tree = [0] * (uses + 1)
        self._last: dict[Hashable, int] = {}
        self._moment = 0
        self._total = 0

    def use(self, name: Hashable, count: int) -> int | None:
        """Use pages now; how many different pages were used since and with them, None if they never were."""
        self._moment += 1
        before = self._last.get(name)
        self._last[name] = self._moment
        if before is None:
            self._total += count
            self._add(self._moment, count)
            return None
        depth = self._total - self._up_to(before) + count
        self._add(before, -count)
        self._add(self._moment, count)
        return depth

    def _add(self, moment: int, count: int) -> None:
        tree, size = self._tree, len(self._tree)
        while moment < size:
            tree[moment] += count
            moment += moment & -moment

    def _up_to(self, moment: int) -> int:
        tree, total = self._tree, 0
        while moment:
            total += tree[moment]
            moment &= moment - 1
        return total
