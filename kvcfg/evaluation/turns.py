"""How long calls take: in rounds in which each has its turn, so that a busy minute meets all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

MIN_TURN_S = 0.01
"""A turn repeats its call until it takes about as long as this."""

_MOST_REPEATS = 1000


@dataclass(slots=True, eq=False)
class Turn:
    """One call that is timed among others.

    Attributes:
        call: does the work once.
        times: seconds of a call, one number a round.
        cpu_times: the same of CPU time, all threads together.
    """

    call: Callable[[], object]
    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median seconds of a call."""
        return median(self.times)

    @property
    def cpu_seconds(self) -> float:
        """Median seconds of CPU time of a call, all threads together."""
        return median(self.cpu_times)


def take_turns(turns: Sequence[Turn], rounds: int, on_round: Callable[[], None] = lambda: None) -> None:
    """Give everyone a turn in each round, in an order that changes; what they took is added to them."""
    repeats = [_repeats(turn.call) for turn in turns]
    shuffler = random.Random(0)
    for _ in range(rounds):
        for index in shuffler.sample(range(len(turns)), len(turns)):
            turn, count = turns[index], repeats[index]
            begin, cpu_begin = time.perf_counter(), time.process_time()
            for _ in range(count):
                turn.call()
            turn.times.append((time.perf_counter() - begin) / count)
            turn.cpu_times.append((time.process_time() - cpu_begin) / count)
        on_round()


def _repeats(call: Callable[[], object]) -> int:
    """Calls of a turn. The first call here warms up, and says enough of one that takes a turn by itself."""
    once = _seconds(call)
    if once < MIN_TURN_S:
        once = _seconds(call)
    return max(1, min(_MOST_REPEATS, round(MIN_TURN_S / max(once, 1e-7))))


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
