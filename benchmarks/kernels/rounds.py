"""What is timed: variants that have their turns in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvcfg.evaluation.turns import Turn, take_turns


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
        turn: what times it.
    """

    side: str
    format: str
    call: Callable[[], object]
    nbytes: int
    page_size: int | None = None
    order: str | None = None
    turn: Turn = field(init=False)

    def __post_init__(self) -> None:
        self.turn = Turn(self.call)

    @property
    def name(self) -> str:
        """What a person would call it."""
        page = [] if self.page_size is None else [f"page {self.page_size}"]
        return " ".join([self.side, self.format, *page, *([self.order] if self.order else [])])

    @property
    def wall_s(self) -> list[float]:
        """Seconds of a call, a round each."""
        return self.turn.times

    @property
    def wall(self) -> float:
        """Median seconds of a call."""
        return self.turn.seconds

    @property
    def cpu(self) -> float:
        """Median seconds of CPU time of a call, all threads together."""
        return self.turn.cpu_seconds

    @property
    def gb_per_s(self) -> float:
        """Bytes over wall time."""
        return self.nbytes / self.wall / 1e9


def measure(variants: Sequence[Variant], rounds: int) -> None:
    """Give every variant a turn per round."""
    take_turns([variant.turn for variant in variants], rounds)
