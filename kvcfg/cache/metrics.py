"""Counters of the page ledger, and the snapshot that is read from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True, slots=True)
class LedgerMetrics:
    """A snapshot; those of several replicas add up with `+`.

    Attributes:
        num_pages: pages of all pools.
        used_pages: pages that a sequence or a pin refers to.
        cached_pages: pages that a prefix look-up can find.
        evictable_pages: cached pages that nothing refers to.
        input_tokens: tokens given out to be computed: each position of a sequence once, refused calls not at all.
        cache_tokens: tokens that prefix hits saved.
        evictions: cached pages given up for new ones.
        refusals: calls that raised CapacityError.
        page_lifetimes: seconds (powers of two) -> evicted pages that had been cached at most that long, and longer
            than half of it.
    """

    num_pages: int
    used_pages: int
    cached_pages: int
    evictable_pages: int
    input_tokens: int
    cache_tokens: int
    evictions: int
    refusals: int
    page_lifetimes: Mapping[float, int]

    @property
    def prompt_tokens(self) -> int:
        """Tokens asked for, computed or saved."""
        return self.input_tokens + self.cache_tokens

    @property
    def cache_hit_rate(self) -> float:
        """Share of tokens that prefix hits saved; 0.0 before the first token."""
        return self.cache_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def free_pages(self) -> int:
        """Pages that can be handed out, evictable ones included."""
        return self.num_pages - self.used_pages

    @property
    def occupancy(self) -> float:
        """Share of pages in use."""
        return self.used_pages / self.num_pages if self.num_pages else 0.0

    def __add__(self, other: LedgerMetrics) -> LedgerMetrics:
        lifetimes = Counter(self.page_lifetimes) + Counter(other.page_lifetimes)
        return LedgerMetrics(
            num_pages=self.num_pages + other.num_pages,
            used_pages=self.used_pages + other.used_pages,
            cached_pages=self.cached_pages + other.cached_pages,
            evictable_pages=self.evictable_pages + other.evictable_pages,
            input_tokens=self.input_tokens + other.input_tokens,
            cache_tokens=self.cache_tokens + other.cache_tokens,
            evictions=self.evictions + other.evictions,
            refusals=self.refusals + other.refusals,
            page_lifetimes=dict(sorted(lifetimes.items())),
        )


@dataclass(slots=True)
class LedgerCounters:
    """What the ledger counts as it works."""

    input_tokens: int = 0
    cache_tokens: int = 0
    evictions: int = 0
    refusals: int = 0
    lifetimes: Counter[float] = field(default_factory=Counter)

    def evicted(self, births: list[float], now: float) -> None:
        """Count evicted pages by how long they had been cached; pages of one commit share a birth."""
        self.evictions += len(births)
        for birth, pages in groupby(births):
            self.lifetimes[_power_of_two(now - birth)] += len(list(pages))

    def reset(self) -> None:
        """Count from zero again."""
        self.input_tokens = self.cache_tokens = self.evictions = self.refusals = 0
        self.lifetimes.clear()


def _power_of_two(seconds: float) -> float:
    """The smallest power of two that is not below a duration; 0.0 for none."""
    if seconds <= 0:
        return 0.0
    mantissa, exponent = math.frexp(seconds)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))
