"""What each verb may be told beside the experiment: where results go, what to print, what to refuse."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kvcfg.config.base import Config, refuse
from kvcfg.config.cache_sizes import CacheSize
from kvcfg.config.retrieval_tasks import unknown_task
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

    tasks: tuple[str, ...] | None = None
    """Retrieval tasks to ask beside it: needle, multi_key, multi_value, variables, frequent_words. null = none."""

    task_tokens: int = Field(1024, ge=1)
    """Tokens of every prompt of a task."""

    task_prompts: int = Field(8, ge=1)
    """Prompts of every task."""

    plot: str | None = None
    """Heat map of what storing does to keys and values, by layer and head: FILE.png, FILE.svg or FILE.pdf. null =
    none."""

    gate: GateOptions = Field(default_factory=GateOptions)
    """Limits for use in CI."""

    @field_validator("tasks")
    @classmethod
    def _tasks_are_known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if problem := unknown_task(names or ()):
            refuse(problem)
        return names


class BenchOptions(Config):
    """`kvcfg bench`: how fast the kernels are on pages of the experiment's layers, and its cache under a real model."""

    output: Output = "table"
    """What is printed: tables to read, or json alone."""

    measure: Literal["auto", "kernels", "model"] = "auto"
    """kernels = reading and writing pages, on random tokens; model = decode steps of the model, which is fetched;
    auto = both, the model only if its weights are here."""

    batch_size: int = Field(8, ge=1)
    """Sequences of a decode step that kernels are timed on."""

    context: int = Field(4096, ge=1)
    """Tokens of each of them; no more than the model's context, or a layer's window, has."""


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


class ExportOptions(Config):
    """`kvcfg export`: a config as an inference engine takes it."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""

    engine: str = "all"
    """vllm, sglang, trtllm, max, lmcache or llamacpp; all = a table of what each of them can say."""

    version: str | None = None
    """Version of the engine, like 26.4; its rules are followed. null = the newest that is known."""

    out: str | None = None
    """File that the engine's settings are written to. null = they are shown."""

    scales: str | None = None
    """Folder for calibrated static scales, in the form that vLLM and compressed-tensors read. null = not written."""


class ImportOptions(Config):
    """`kvcfg import`: an engine's settings as a config of kvcfg."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""

    beside: tuple[str, ...] = ()
    """Overrides for what it does not say, like the devices; the words behind the first."""

    source: str | None = None
    """A command line of an engine, in quotes, or a file that it reads; the first word behind the verb."""

    engine: str | None = None
    """vllm, sglang or max. null = the one that the command line or file looks like."""

    version: str | None = None
    """Version of the engine, like 26.4. null = the newest that is known."""

    out: str | None = None
    """Preset file that the config is written to. null = not written."""


class DiffOptions(Config):
    """`kvcfg diff`: what differs between two configs, in bytes, in what engines are told, and as measured."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""

    a: str | None = None
    """Overrides, a file, or the fingerprint of a row; the first word behind the verb."""

    b: str | None = None
    """The same for the other side; the second word."""

    beside: tuple[str, ...] = ()
    """Overrides for both sides; the words behind the second."""

    results: str = RESULTS_FILE
    """JSONL file of measured rows, in which fingerprints and figures are looked up."""


class RerunOptions(Config):
    """`kvcfg rerun`: a measured row once more."""

    output: Output = "table"
    """What is printed: a table to read, or json alone."""

    fingerprint: str | None = None
    """How the row's fingerprint begins; the word behind the verb."""

    results: str = RESULTS_FILE
    """JSONL file of measured rows; the new row is not added to it."""


VERBS: dict[str, type[Config]] = {
    "plan": PlanOptions,
    "fit": FitOptions,
    "eval": EvalOptions,
    "bench": BenchOptions,
    "replay": ReplayOptions,
    "calibrate": CalibrateOptions,
    "fetch": FetchOptions,
    "export": ExportOptions,
    "import": ImportOptions,
    "diff": DiffOptions,
    "rerun": RerunOptions,
}
