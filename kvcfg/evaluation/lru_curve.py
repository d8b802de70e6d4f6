"""The hit rate of an lru cache at every capacity, from one pass over a trace.

A page is found again if the pages used since fit in the cache with it. So one number per use, its stack distance,
answers for all capacities (Mattson et al., 1970). Requests are served one after the other. How the pages of one
prompt follow each other is a matter of which are given up first once it is done:

    head_first   its pages were used from first to last. A prompt longer than the cache passes through it in pieces,
                 so its end is what stays.
    tail_first   its first page outlives the others. Of a prompt longer than the cache the beginning stays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate

from kvcfg.evaluation.trace_pages import PagedRequest, PagedTrace


class LruCurve:
    """What an lru cache finds of a trace, as a function of its capacity.

    Args:
        trace: the trace in pages.
        head_first: whether the first page of a prompt is given up before its last one.
    """

    def __init__(self, trace: PagedTrace, *, head_first: bool = True) -> None:
        self.trace, self.head_first = trace, head_first
        self._depths = list(_head_first(trace) if head_first else _tail_first(trace))
        found: Counter[int] = Counter()
        beyond_named: Counter[int] = Counter()
        beyond_saved: Counter[int] = Counter()
        for request, depths in zip(trace.requests, self._depths, strict=True):
            for depth, run in zip(depths, request.runs, strict=False):
                if head_first:
                    found[depth] += len(run)
                else:
                    found.update(range(depth, depth + len(run)))
            if depths and len(depths) == len(request.runs):
                last = depths[-1] if head_first else depths[-1] + len(request.runs[-1]) - 1
                named = request.tokens_in(request.num_pages, trace.page_size)
                beyond_named[last] += request.num_pages * trace.page_size - named
                beyond_saved[last] += request.num_pages * trace.page_size - min(named, request.input_tokens - 1)
        self._found = _Steps(found)
        self._beyond_named, self._beyond_saved = _Steps(beyond_named), _Steps(beyond_saved)
        self._lengths = sorted([request.num_pages for request in trace.requests])
        self._sums = [0, *accumulate(self._lengths)]

    def hit_pages(self, num_pages: int | None) -> int:
        """Pages found in a cache of that many pages; None = unbounded."""
        return self._found.upto(num_pages)

    def hit_tokens(self, num_pages: int | None) -> int:
        """Tokens of the pages found, each page counted as whole as the trace names it."""
        return self.hit_pages(num_pages) * self.trace.page_size - self._beyond_named.upto(num_pages)

    def saved_tokens(self, num_pages: int | None) -> int:
        """Prompt tokens that are not computed again; at least one of each prompt is."""
        return self.hit_pages(num_pages) * self.trace.page_size - self._beyond_saved.upto(num_pages)

    def hit_rate(self, num_pages: int | None) -> float:
        """Tokens of the pages found over the tokens of all prompts, 0 to 1."""
        total = self.trace.input_tokens
        return min(1.0, self.hit_tokens(num_pages) / total) if total else 0.0

    def evictions(self, num_pages: int | None) -> int:
        """Cached pages given up for others."""
        unique = self.trace.unique_pages
        if not num_pages or num_pages >= unique:
            return 0
        used = self._sums[-1]
        if not self.head_first:  # what does not fit is never cached
            longer = bisect_right(self._lengths, num_pages)
            used = self._sums[longer] + num_pages * (len(self._lengths) - longer)
        return max(0, used - self.hit_pages(num_pages) - num_pages)

    def peak_pages(self, num_pages: int | None) -> int:
        """Most pages that a request holds."""
        longest = self._lengths[-1]
        return longest if num_pages is None else min(longest, num_pages)

    def found(self, request: int, num_pages: int) -> int:
        """Pages that the n-th request finds in a cache of that many pages."""
        count = 0
        for depth, run in zip(self._depths[request], self.trace.requests[request].runs, strict=False):
            if depth > num_pages:
                break
            count += len(run) if self.head_first else min(len(run), num_pages - depth + 1)
        return count

    def corners(self) -> list[tuple[int, float]]:
        """Every capacity, in pages, at which the hit rate rises, and the rate from there on."""
        return [(capacity, self.hit_rate(capacity)) for capacity in self._found.places]


class _Steps:
    """A sum that grows at some capacities."""

    def __init__(self, rises: Mapping[int, int]) -> None:
        self.places = sorted(rises)
        self._sums = [0, *accumulate(rises[place] for place in self.places)]

    def upto(self, capacity: int | None) -> int:
        return self._sums[-1] if capacity is None else self._sums[bisect_right(self.places, capacity)]


def _head_first(trace: PagedTrace) -> Iterator[list[int]]:
    """For each request the capacity that each run takes to be found, up to the first run that never was used.

    All pages of a run have the same: using its first page again moves that one behind the others.
    """
    stack = _Recency(trace)
    for request in trace.requests:
        depths: list[int] = []
        is_known = True
        for run in request.runs:
            above = stack.above(run)
            stack.use(run)
            is_known = is_known and above is not None
            if is_known and above is not None:
                depths.append(max(depths[-1] if depths else 0, above + len(run)))
        yield depths


def _tail_first(trace: PagedTrace) -> Iterator[list[int]]:
    """The same for the first page of each run; each page after it takes one more."""
    stack = _Recency(trace)
    for request in trace.requests:
        yield _known_depths(stack, request)
        for run in reversed(request.runs):
            stack.use(run)


def _known_depths(stack: _Recency, request: PagedRequest) -> list[int]:
    depths: list[int] = []
    for run in request.runs:
        if (above := stack.above(run)) is None:
            break
        depths.append(above + 1)
    return depths


class _Recency:
    """Runs of pages in the order of their last use: a Fenwick tree over the moments of use, weighted by pages."""

    def __init__(self, trace: PagedTrace) -> None:
        self._tree = [0] * (sum([len(request.runs) for request in trace.requests]) + 1)
        self._last: dict[int, int] = {}
        self._moment = 0
        self._total = 0

    def above(self, run: range) -> int | None:
        """Pages used after this run was; None if it never was."""
        moment = self._last.get(run.start)
        if moment is None:
            return None
        tree, total = self._tree, self._total
        while moment:
            total -= tree[moment]
            moment &= moment - 1
        return total

    def use(self, run: range) -> None:
        """Use a run now."""
        self._moment += 1
        before = self._last.get(run.start)
        self._last[run.start] = self._moment
        if before is None:
            self._total += len(run)
        else:
            self._add(before, -len(run))
        self._add(self._moment, len(run))

    def _add(self, moment: int, count: int) -> None:
        tree, size = self._tree, len(self._tree)
        while moment < size:
            tree[moment] += count
            moment += moment & -moment
