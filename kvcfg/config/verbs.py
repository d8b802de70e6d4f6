"""What each verb may be told beside the experiment: where results go, what to print, what to refuse."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvcfg.config.base import Config

Output = Literal["table", "json"]

RESULTS_FILE = "./results/rows.jsonl"


class PlanOptions(Config):
    """`kvcfg plan`: what a cache costs."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""


class FitOptions(Config):
    """`kvcfg fit`: what would make a workload fit."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""


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


class FetchOptions(Config):
    """`kvcfg fetch`: bring the model's weights to this machine."""

    output: Output = "table"
    """What is printed: a line to read, or json alone."""


VERBS: dict[str, type[Config]] = {
    "plan": PlanOptions,
    "fit": FitOptions,
    "eval": EvalOptions,
    "bench": BenchOptions,
    "fetch": FetchOptions,
}
