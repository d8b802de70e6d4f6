"""What each verb may be told beside the experiment: where results go, what to print, what to refuse."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kvcfg.config.base import Config, refuse
from kvcfg.config.cache_sizes import CacheSize
from kvcfg.errors import Problem

Output = Literal["table", "json"]

RESULTS_FILE = "./results/rows.jsonl"

CAPACITIES = ("16k", "64k", "256k", "1M", "4M", "16M", "unbounded", "plan")


class PlanOptions(Config):
    """`kvcfg plan`: what a cache costs."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""


class FitGateOptions(Config):
    """What formats that `kvcfg fit quantization=auto` finds must keep to."""

    max_kl: float | None = Field(None, gt=0)
    """Largest mean KL divergence to the full-precision cache, in nats. null = the least that fits in memory."""


class FitOptions(Config):
    """`kvcfg fit`: what would make a workload fit, or which formats suit each layer."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""

    gate: FitGateOptions = Field(default_factory=FitGateOptions)
    """Limits for quantization=auto."""


class GateOptions(Config):
    """What a measured row must keep to; `kvcfg eval` exits 1 if it does not."""

    max_kl: float | None = Field(None, ge=0)
    """Largest mean KL divergence to the full-precision cache, in nats. null = any."""

    baseline: str | None = None
    """JSON file of an earlier row; the new one may not be worse by more than its interval. null = none."""


class EvalOptions(Config):
    """`kvcfg eval`: what a cache loses and how fast it is, on a real model."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""

    results: str = RESULTS_FILE
    """JSONL file that rows are appended to, and that is searched for finished ones."""

    force: bool = False
    """Measure again although a finished row exists."""

    gate: GateOptions = Field(default_factory=GateOptions)
    """Limits for use in CI."""


class BenchOptions(Config):
    """`kvcfg bench`: how fast a cache is."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""


class CalibrateOptions(Config):
    """`kvcfg calibrate`: measure a model's keys for calibrated recipes."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""


class FetchOptions(Config):
    """`kvcfg fetch`: bring the model's weights to this machine."""

    output: Output = "table"
    """What is printed: a line to read, or json alone."""


class ReplayOptions(Config):
    """`kvcfg replay`: what a prefix cache is worth on a trace of requests."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""

    capacities: tuple[int | str, ...] = Field(CAPACITIES, min_length=1)
    """Sizes of a replica's cache: tokens (16k, 1M), bytes (8GiB), plan (what `kvcfg plan` gives it) or unbounded."""

    engine: Literal["auto", "curve", "ledger"] = "auto"
    """curve reads every capacity off one pass over the trace (lru, one request at a time), ledger serves the trace
    at each capacity with the cache's own bookkeeping; auto takes the curve where it is exact."""

    running: int = Field(1, ge=1)
    """Requests that hold their pages at the same time; fewer while they do not fit."""

    release: Literal["head_first", "tail_first"] = "head_first"
    """Which pages of a prompt that is done are given up first: those of its head, as published hit rates assume,
    or those of its tail, so that a prefix outlives what follows it."""

    plot: str | None = None
    """Picture of the hit rate over the capacity: FILE.png, FILE.svg or FILE.pdf. null = none."""

    plot_axis: Literal["auto", "tokens", "bytes"] = "auto"
    """What the plot counts capacity in; auto = bytes where a token takes different bytes, else tokens."""

    results: str = RESULTS_FILE
    """JSONL file of measured rows, in which the KL of each model and format is looked up."""

    @field_validator("capacities")
    @classmethod
    def _capacities_are_sizes(cls, values: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for value in values:
            try:
                CacheSize.parse(value)
            except ValueError as error:
                refuse(Problem("capacities", str(error), list(values), "capacities=[16k,8GiB,plan,unbounded]"))
        return values

    @property
    def sizes(self) -> tuple[CacheSize, ...]:
        """The capacities, read."""
        return tuple(CacheSize.parse(value) for value in self.capacities)


VERBS: dict[str, type[Config]] = {
    "plan": PlanOptions,
    "fit": FitOptions,
    "eval": EvalOptions,
    "bench": BenchOptions,
    "replay": ReplayOptions,
    "calibrate": CalibrateOptions,
    "fetch": FetchOptions,
}
