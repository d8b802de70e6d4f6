"""What a prefix cache is worth on real requests, for one experiment at several capacities. Torch-free.

lru with one request at a time is read off one stack-distance pass (`LruCurve`); everything else is served by the
cache's own ledger (`serve`), at each capacity anew. Work that experiments share is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.problems import check_options
from kvcfg.config.verbs import CAPACITIES, RESULTS_FILE, ReplayOptions
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.lru_curve import LruCurve
from kvcfg.evaluation.replay_job import ReplayJob, prepare
from kvcfg.evaluation.serving import Served, serve
from kvcfg.evaluation.trace_pages import PagedTrace
from kvcfg.evaluation.traces import TRACE_KEY, Trace
from kvcfg.planning.plan_text import where
from kvcfg.units import readable_count


@dataclass(frozen=True, slots=True)
class CapacityRow:
    """What one capacity of a replica's cache finds.

    Attributes:
        capacity: as it was asked for.
        num_pages: pages that it is; for `unbounded` those that the trace fills.
        num_tokens: the same in tokens.
        num_bytes: the same in bytes, over all devices of the replica.
        hit_rate: tokens of the pages found in any tier over the tokens of all prompts, 0 to 1. Pages count as whole
            as the trace names them.
        hit_rates: the same for each tier: a page counts for the first that has it.
        saved_tokens: prompt tokens that are not computed again; at least one of each prompt is.
        evictions: cached pages that the device gave up for others.
        peak_pages: most pages of the device in use by requests at one time.
        engine: what found it out.
    """

    capacity: str
    num_pages: int
    num_tokens: int
    num_bytes: int
    hit_rate: float
    hit_rates: Mapping[str, float]
    saved_tokens: int
    evictions: int
    peak_pages: int
    engine: Literal["curve", "ledger"]


@dataclass(frozen=True)
class Replay:
    """A trace replayed for one experiment.

    Attributes:
        job: the experiment, what its pages cost and how it was replayed.
        trace: the trace in pages.
        path: the trace file.
        rows: one a capacity.
        curve: of an lru cache with one request at a time, every capacity; else None.
        notes: what to know when reading the figures.
    """

    job: ReplayJob
    trace: PagedTrace
    path: str
    rows: tuple[CapacityRow, ...]
    curve: LruCurve | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The replay as plain values that JSON can hold; rates are 0 to 1."""
        job, row = self.job, self.job.row
        return {
            "model": job.experiment.model.name,
            "devices": where(job.plan),
            "page_size": job.page_size,
            "format": job.format,
            "recipe": job.recipe,
            "eviction": job.experiment.cache.eviction,
            "running": job.options.running,
            "release": job.options.release,
            "bytes_per_page": job.bytes_per_page,
            "bytes_per_token": job.plan.bytes_per_token,
            "tiers": {tier.name: tier.num_pages for tier in job.tiers},
            "kl": None if row is None else row.kl,
            "kl_ci": None if row is None else list(row.kl_ci),
            "trace": {
                "path": self.path,
                "requests": len(self.trace.requests),
                "input_tokens": self.trace.input_tokens,
                "unique_pages": self.trace.unique_pages,
            },
            "capacities": [asdict(item) for item in self.rows],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The replay as text for people, at most 120 columns wide."""
        from kvcfg.evaluation.replay_text import replay_text

        return replay_text(self)

    def __str__(self) -> str:
        return self.table()


def replay_trace(
    experiment: ExperimentConfig,
    capacities: Sequence[int | str] = CAPACITIES,
    *,
    engine: str = "auto",
    running: int = 1,
    release: str = "head_first",
    results: str = RESULTS_FILE,
) -> Replay:
    """Replay the trace that `workload.trace` names: hit rates of a prefix cache, by capacity. Torch is not needed.

    Args:
        experiment: what the cache is.
        capacities: of one replica: tokens (`16k`), bytes (`8GiB`), `plan` or `unbounded`.
        engine: `curve`, `ledger`, or `auto`: the curve where it is exact.
        running: requests that hold their pages at the same time.
        release: which pages of a prompt that is done go first: `head_first` or `tail_first`.
        results: file of measured rows, for the KL of the format.

    Raises:
        ConfigError: if there is no trace, it cannot be read, or a value cannot be.
    """
    asked = {"capacities": list(capacities), "engine": engine, "running": running, "release": release}
    options, problems = check_options(ReplayOptions, asked | {"results": results})
    if problems:
        raise ConfigError(problems)
    replayer = TraceReplayer(read_trace(experiment))
    return replayer.replay(prepare(experiment, options, replayer.trace))


def read_trace(experiment: ExperimentConfig) -> Trace:
    """The trace of an experiment's workload.

    Raises:
        ConfigError: if it names none, or it cannot be read.
    """
    workload = experiment.workload
    if workload.trace is None:
        rule = "must be the path of a request trace: JSON lines with hash_ids, tokens or text"
        raise ConfigError(Problem(TRACE_KEY, rule, None, f"{TRACE_KEY}=requests.jsonl"))
    return Trace.read(workload.trace, workload.trace_block_size)


class TraceReplayer:
    """Replays one trace for any number of experiments, and keeps what they share."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._paged: dict[int, PagedTrace] = {}
        self._curves: dict[tuple[int, bool], LruCurve] = {}
        self._served: dict[tuple[Any, ...], Served] = {}

    def replay(self, job: ReplayJob, step_done: Callable[[], None] = lambda: None) -> Replay:
        """The trace replayed for one job; `step_done` is called after each capacity."""
        trace = self._pages(job.page_size)
        rows = []
        for size in job.options.sizes:
            pages = job.num_pages(size)
            rows.append(self._row(job, size.text, trace.unique_pages if pages is None else pages))
            step_done()
        is_lru = job.experiment.cache.eviction == "lru" and job.options.running == 1
        curve = self._curve(job) if is_lru else None
        return Replay(job, trace, self.trace.path, tuple(rows), curve, tuple(self._notes(job)))

    def _notes(self, job: ReplayJob) -> list[str]:
        unnamed = self.trace.unnamed_tokens
        if not unnamed:
            return list(job.notes())
        told = f"{readable_count(unnamed)} prompt tokens are in full blocks without a hash id and are never found."
        return [told, *job.notes()]

    def _row(self, job: ReplayJob, capacity: str, num_pages: int) -> CapacityRow:
        trace, page_size = self._pages(job.page_size), job.page_size
        curve = self._curve(job)
        is_exact = job.options.running == 1 and (
            job.experiment.cache.eviction == "lru" or num_pages >= trace.unique_pages
        )
        reach = [num_pages]
        for tier in job.tiers:
            reach.append(max(reach[-1], tier.num_pages))
        if num_pages == 0 or job.options.engine == "curve" or (job.options.engine == "auto" and is_exact):
            engine: Literal["curve", "ledger"] = "curve"
            rates = [curve.hit_rate(pages) for pages in reach]
            saved, evictions, peak = (
                curve.saved_tokens(reach[-1]),
                curve.evictions(num_pages),
                curve.peak_pages(num_pages),
            )
        else:
            engine = "ledger"
            device = self._serve(job, num_pages)
            tiers = [device, *(device.behind(curve, pages) for pages in reach[1:])]
            rates = [served.hit_rate for served in tiers]
            saved, evictions, peak = tiers[-1].saved_tokens, device.evictions, device.peak_pages
        names = ["device", *(tier.name for tier in job.tiers)]
        return CapacityRow(
            capacity=capacity,
            num_pages=num_pages,
            num_tokens=num_pages * page_size,
            num_bytes=num_pages * job.bytes_per_page,
            hit_rate=rates[-1],
            hit_rates=dict(
                zip(names, [high - low for low, high in zip([0.0, *rates], rates, strict=False)], strict=True)
            ),
            saved_tokens=saved,
            evictions=evictions,
            peak_pages=peak,
            engine=engine,
        )

    def _pages(self, page_size: int) -> PagedTrace:
        if page_size not in self._paged:
            self._paged[page_size] = PagedTrace.of(self.trace, page_size)
        return self._paged[page_size]

    def _curve(self, job: ReplayJob) -> LruCurve:
        key = (job.page_size, job.head_first)
        if key not in self._curves:
            self._curves[key] = LruCurve(self._pages(job.page_size), head_first=job.head_first)
        return self._curves[key]

    def _serve(self, job: ReplayJob, num_pages: int) -> Served:
        settings = (num_pages, job.experiment.cache.eviction, job.options.running, job.head_first)
        key = (job.page_size, *settings)
        if key not in self._served:
            pages, eviction, running, head_first = settings
            trace = self._pages(job.page_size)
            self._served[key] = serve(trace, pages, eviction=eviction, running=running, head_first=head_first)
        return self._served[key]
