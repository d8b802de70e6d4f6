"""Who takes part in the next step, with how many tokens, and who has to make room.

Requests stand in one order of precedence (priority, then age), those that run and those that wait. A step goes through
the running ones in that order: each gets its tokens, as many of a prompt as the step has left, less one for everybody
after it who decodes. Where pages run out, the last one running gives up its own and waits; when it resumes, what the
prefix cache still has of it is found and the rest is computed again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from kvcfg.cache.manager import KVCacheManager
from kvcfg.errors import CapacityError
from kvcfg.integrations.serving.metrics import ServingCounters
from kvcfg.integrations.serving.request import Request
from kvcfg.units import ceil_div


class Share(NamedTuple):
    """The tokens of one request in a step, by position."""

    request: Request
    start: int
    stop: int


class Scheduler:
    """Requests that run and wait, and their pages.

    Args:
        manager: the pages, of one replica; sequences are named by their request's number.
        step_tokens: the most tokens of a step.
        counters: where hits, computed tokens and preemptions are counted.

    Attributes:
        waiting: by precedence.
        running: by precedence.
    """

    def __init__(self, manager: KVCacheManager, step_tokens: int, counters: ServingCounters) -> None:
        self._manager, self._step_tokens, self._counters = manager, step_tokens, counters
        self._ledger = manager.replicas[0].ledger
        self._page_size = manager.params.page_size
        self._growing = [place for place, group in enumerate(manager.params.params) if group.grows]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._known: dict[int, int] = {}  # tokens that a running request came with: those after it were decoded

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        insort(self.waiting, request, key=attrgetter("precedence"))

    def remove(self, request: Request) -> None:
        """Forget a request; its pages are free again."""
        if request in self.running:
            self._stop(request)
        else:
            self.waiting.remove(request)

    def next_step(self) -> list[Share]:
        """Admit who fits, and give everybody who runs a share of the step; their pages are allocated.

        Raises:
            CapacityError: if the only request running does not fit in all the pages.
        """
        self._admit()
        shares, left, place = list[Share](), self._step_tokens, 0
        decoding = sum(map(self._decodes, self.running))
        # Those who have to make room leave at the end of the list, behind this place.
        while place < len(self.running) and left:
            request = self.running[place]
            decoding -= self._decodes(request)
            share = self._share(request, max(1, left - decoding))
            if share is None:
                break
            shares.append(share)
            left -= share.stop - share.start
            place += 1
        return shares

    def preempt(self, request: Request) -> None:
        """Take a running request's pages away; it waits to be run again."""
        self._stop(request)
        self.add(request)
        request.preemptions += 1
        self._counters.preemptions += 1

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        self._manager.release(request.number)
        del self._known[request.number]

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            if not self._begin(request):
                if not self.running or self.running[-1].priority >= request.priority:
                    return
                self.preempt(self.running[-1])
                continue
            del self.waiting[0]
            self._known[request.number] = request.length
            insort(self.running, request, key=attrgetter("precedence"))

    def _begin(self, request: Request) -> bool:
        """Claim a waiting request if there are pages for all that it comes with, beside what the running ones lack."""
        manager, number = self._manager, request.number
        if len(self.running) == manager.max_batch_size:
            return False
        manager.claim(number, request.ids, replica=0, priority=request.priority)
        forecast = self._ledger.forecast(number, request.length)
        free = self._ledger.metrics().free_pages - sum(self._lacking())
        if self.running and not (forecast.fits and forecast.pages < free):
            manager.release(number)
            return False
        return True

    def _lacking(self) -> Iterator[int]:
        """Pages that each running request still needs for what it came with, and its next token."""
        for request in self.running if self._growing else ():
            held = len(self._ledger.page_table(request.number, self._growing[0]).pages)
            yield max(0, ceil_div(request.length + 1, self._page_size) - held)

    def _decodes(self, request: Request) -> bool:
        return request.length - self._ledger.length(request.number) == 1

    def _share(self, request: Request, most: int) -> Share | None:
        """Pages for a request's next tokens, at the cost of those behind it; None if it had to go itself."""
        manager, number = self._manager, request.number
        stored = self._ledger.length(number)
        left = request.length - stored
        cached = self._ledger.forecast(number, left).cached_tokens if left > 1 else 0
        count = min(left - cached, most)
        limit = manager.step_limit(number)
        if limit is not None:
            # What is found ends with a page.
            count = min(count, self._page_size if cached else limit)
        while True:
            try:
                start = manager.alloc(number, cached + count).length
                break
            except CapacityError:
                last = self.running[-1]
                if last is request and len(self.running) == 1:
                    raise
                self.preempt(last)
                if last is request:
                    return None
        found, stop = start - stored, stored + cached + count
        request.cached_tokens += found
        self._counters.cached_tokens += found
        self._counters.prompt_tokens += max(0, min(stop, self._known[number]) - start)
        return Share(request, start, stop)
