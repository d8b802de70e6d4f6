"""What the engine counts, and the figures that are read from it."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMetrics:
    """A snapshot of an engine.

    Attributes:
        submitted, finished, cancelled: requests.
        waiting, running: requests that are there now.
        steps: forward passes.
        prompt_tokens: tokens that requests began or resumed with and that were computed.
        cached_tokens: those that the prefix cache had.
        generated_tokens: tokens that were made.
        preemptions: requests whose pages were taken away, to resume later.
        peak_pages: most pages in use at one time.
        seconds: time spent in steps.
        times_to_first_token: seconds, of every request that has a token, in the order of these tokens.
    """

    submitted: int
    finished: int
    cancelled: int
    waiting: int
    running: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    peak_pages: int
    seconds: float
    times_to_first_token: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second of steps; 0.0 before the first."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the tokens that requests came with which the prefix cache had; 0.0 before the first."""
        asked = self.prompt_tokens + self.cached_tokens
        return self.cached_tokens / asked if asked else 0.0

    @property
    def time_to_first_token(self) -> float | None:
        """Median seconds from submission to the first token; None before the first."""
        return statistics.median(self.times_to_first_token) if self.times_to_first_token else None

    def __str__(self) -> str:
        first = self.time_to_first_token
        lines = [
            f"requests          {self.finished} finished, {self.cancelled} cancelled, {self.running} running, "
            f"{self.waiting} waiting",
            f"tokens            {self.generated_tokens} generated, {self.prompt_tokens} of prompts computed, "
            f"{self.cached_tokens} found ({self.prefix_hit_rate:.1%})",
            f"speed             {self.tokens_per_second:.1f} tokens/s in {self.steps} steps, first token after "
            + ("-" if first is None else f"{1e3 * first:.0f} ms"),
            f"pages             {self.peak_pages} at most, {self.preemptions} preemptions",
        ]
        return "\n".join(lines)


@dataclass(slots=True)
class ServingCounters:
    """What the engine counts as it goes; see `ServingMetrics`."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    seconds: float = 0.0
    times_to_first_token: list[float] = field(default_factory=list)

    def snapshot(self, *, waiting: int, running: int) -> ServingMetrics:
        """The counters as they are now."""
        counted = asdict(self) | {"times_to_first_token": tuple(self.times_to_first_token)}
        return ServingMetrics(**counted, waiting=waiting, running=running)
