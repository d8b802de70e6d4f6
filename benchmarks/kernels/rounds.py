"""How time is taken: in rounds in which every variant has its turn, so that a busy minute meets all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

MIN_TURN_S = 0.01
"""A turn repeats its call until it takes about as long as this."""


@dataclass(slots=True)
class Variant:
    """One way of doing what a point asks for.

    Attributes:
        side: kvcfg, vllm, torch or read.
        format: how keys and values are stored.
        call: does it once; every call finds other pages than the last.
        nbytes: bytes that a call must read, or of what it is given to write.
        page_size: tokens per page.
        order: how pages of a sequence lie: random or consecutive.
        wall_s, cpu_s: seconds per call, a round each; CPU time is that of all threads together.
    """

    side: str
    format: str
    call: Callable[[], object]
    nbytes: int
    page_size: int | None = None
    order: str | None = None
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What a person would call it."""
        page = [] if self.page_size is None else [f"page {self.page_size}"]
        return " ".join([self.side, self.format, *page, *([self.order] if self.order else [])])

    @property
    def wall(self) -> float:
        """Median seconds of a call."""
        return median(self.wall_s)

    @property
    def cpu(self) -> float:
        """Median seconds of CPU time of a call, all threads together."""
        return median(self.cpu_s)

    @property
    def gb_per_s(self) -> float:
        """Bytes over wall time."""
        return self.nbytes / self.wall / 1e9


def measure(variants: Sequence[Variant], rounds: int, seed: int = 0) -> None:
    """Give every variant a turn per round, in an order that changes; what they took is added to them."""
    repeats = [_repeats(variant) for variant in variants]
    shuffler = random.Random(seed)
    for _ in range(rounds):
        for index in shuffler.sample(range(len(variants)), len(variants)):
            variant, count = variants[index], repeats[index]
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                variant.call()
            variant.wall_s.append((time.perf_counter() - wall) / count)
            variant.cpu_s.append((time.process_time() - cpu) / count)


def _repeats(variant: Variant) -> int:
    """Calls of a turn; the first call here is a warm-up."""
    variant.call()
    start = time.perf_counter()
    variant.call()
    once = time.perf_counter() - start
    return max(1, min(1000, round(MIN_TURN_S / max(once, 1e-7))))
