"""A request trace served by the cache's own ledger: any capacity, page size and eviction policy, without a tensor.

Requests are served in the order in which they arrive. What a request finds it holds; the pages it lacks it takes,
and cached ones are given up for them. `LruCurve` must agree where it applies.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from kvcfg.cache.ledger import PageLedger
from kvcfg.errors import CapacityError, ConfigError, Problem
from kvcfg.evaluation.lru_curve import LruCurve
from kvcfg.evaluation.trace_pages import PagedTrace


@dataclass(frozen=True, slots=True)
class Served:
    """What happened to a trace in one cache.

    Attributes:
        trace: the trace in pages.
        num_pages: capacity; None = unbounded.
        eviction: which cached page went first.
        found: pages that each request found in the cache.
        evictions: cached pages given up for others.
        peak_pages: most pages in use by requests at one time.
    """

    trace: PagedTrace
    num_pages: int | None
    eviction: str
    found: tuple[int, ...]
    evictions: int
    peak_pages: int

    @property
    def hit_pages(self) -> int:
        """Pages found by all requests."""
        return sum(self.found)

    @property
    def hit_tokens(self) -> int:
        """Tokens of the pages found, each page counted as whole as the trace names it."""
        return sum(self._tokens_found())

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that were not computed again; at least one of each prompt is."""
        most = [max(request.input_tokens - 1, 0) for request in self.trace.requests]
        return sum(map(min, self._tokens_found(), most))

    @property
    def hit_rate(self) -> float:
        """Tokens of the pages found over the tokens of all prompts, 0 to 1."""
        return min(1.0, self.hit_tokens / self.trace.input_tokens) if self.trace.input_tokens else 0.0

    def behind(self, curve: LruCurve, num_pages: int) -> Served:
        """The same with a second tier behind it, an lru cache of that many pages which sees every use."""
        found = [max(count, curve.found(index, num_pages)) for index, count in enumerate(self.found)]
        return replace(self, found=tuple(found))

    def _tokens_found(self) -> list[int]:
        size = self.trace.page_size
        return [request.tokens_in(count, size) for request, count in zip(self.trace.requests, self.found, strict=True)]


def serve(
    trace: PagedTrace,
    num_pages: int | None = None,
    *,
    eviction: str = "lru",
    running: int = 1,
    head_first: bool = True,
) -> Served:
    """Serve a trace through a ledger of its own.

    Args:
        trace: the trace in pages.
        num_pages: capacity; None = as many as the trace has.
        eviction: a name in `kvcfg.cache.eviction.POLICIES`.
        running: requests that hold their pages at the same time; fewer while they do not fit.
        head_first: whether the first page of a prompt that is done is given up before its last one. Then a prompt
            longer than the cache passes through it in pieces; else only its beginning is kept.

    Raises:
        ConfigError: if the policy is unknown or a number is below 1.
    """
    for key, number in (("num_pages", num_pages), ("running", running)):
        if number is not None and number < 1:
            raise ConfigError(Problem(key, "must be at least 1", number))
    service = _Service(num_pages or max(1, trace.unique_pages), trace.page_size, eviction, running, head_first)
    found = tuple([service.serve(request.pages()) for request in trace.requests])
    return Served(trace, num_pages, eviction, found, service.ledger.metrics().evictions, service.peak_pages)


class _Service:
    """One ledger and the requests that hold its pages."""

    def __init__(self, capacity: int, page_size: int, eviction: str, running: int, head_first: bool) -> None:
        # The ledger looks nothing up for a single token. Pages go by their names here, so two tokens do as well.
        self.page_size = max(page_size, 2)
        self.ledger = PageLedger(capacity, self.page_size, eviction=eviction)
        self.running, self.head_first = running, head_first
        self.peak_pages = 0
        self._held: deque[int] = deque()
        self._serial = 0

    def serve(self, pages: list[int]) -> int:
        """One request; how many of its pages were found."""
        size = self.ledger.num_pages
        pieces = range(0, len(pages), size) if self.head_first else range(min(len(pages), 1))
        return sum([self._serve_piece(pages[start : start + size]) for start in pieces])

    def _serve_piece(self, pages: list[int]) -> int:
        while len(self._held) >= self.running:
            self._end_oldest()
        self._serial += 1
        ledger, seq_id, num_tokens = self.ledger, self._serial, len(pages) * self.page_size
        ledger.claim(seq_id, names=pages)
        while True:
            try:
                cached = ledger.alloc(seq_id, num_tokens).cached_tokens
                break
            except CapacityError:
                if not self._held:
                    raise
                self._end_oldest()
        ledger.commit(seq_id, num_tokens - cached)
        self._held.append(seq_id)
        self.peak_pages = max(self.peak_pages, ledger.metrics().used_pages)
        return cached // self.page_size

    def _end_oldest(self) -> None:
        self.ledger.release(self._held.popleft(), head_first=self.head_first)
