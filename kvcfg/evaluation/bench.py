"""How fast a cache decodes beside transformers' own, in one run, step by step in turn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.evaluation.measure import sized_to_windows
from kvcfg.evaluation.progress import progress_bar
from kvcfg.evaluation.quality import agreement, full_precision, logits
from kvcfg.evaluation.speed import decode_step_seconds
from kvcfg.evaluation.text import text_windows
from kvcfg.integrations.loading import load, load_tokenizer
from kvcfg.integrations.transformers import TransformersCache, build


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """Decode steps with one cache beside those with DynamicCache, at batch 1 after one window of text.

    Attributes:
        model, format, page_size: what was measured.
        context: tokens in the cache when decoding begins.
        step_ms: median milliseconds of a decode step with this cache.
        worst_step_ms: its slowest step.
        dynamic_step_ms: median of DynamicCache, timed in turn with this cache.
        ratio: step_ms / dynamic_step_ms; below 1 is faster.
        cache_bytes: bytes allocated for the context and the steps.
        dynamic_bytes: bytes that DynamicCache held.
        kl: mean KL of the window's predictions, in nats: a cache that is fast and wrong shows here.
    """

    model: str
    format: str
    page_size: int
    context: int
    step_ms: float
    worst_step_ms: float
    dynamic_step_ms: float
    ratio: float
    cache_bytes: int
    dynamic_bytes: int
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)

    def table(self) -> str:
        """The row as a table of its own."""
        return speed_table([self])


@torch.no_grad()
def measure_speed(experiment: ExperimentConfig, model: Any = None) -> SpeedRow:
    """Time decode steps with the experiment's cache and with DynamicCache, in turn, after the same window.

    Args:
        experiment: what to measure; `workload.window_tokens` is the context, `workload.decode_tokens` the steps.
        model: a causal language model of transformers; None loads the experiment's own.

    Raises:
        ConfigError, ShapeError, BackendUnavailable, CapacityError: as `evaluate`.
    """
    if model is None:
        model = load(experiment).model
    workload = experiment.workload
    window = text_windows(workload, load_tokenizer(experiment))[0]
    pages = build(sized_to_windows(experiment), model)
    caches = {"paged": TransformersCache(pages), "dynamic": full_precision(1)}
    format_name = pages.params.params[0].storage.format_name
    title = f"{format_name} beside DynamicCache, {workload.window_tokens} tokens"
    with progress_bar(title, len(caches) + workload.decode_tokens) as step_done:
        predictions = {}
        for name, cache in caches.items():
            predictions[name] = logits(model, window[None], partial(_given, cache))[0]
            step_done()
        seconds: dict[str, list[float]] = {name: [] for name in caches}
        for _ in range(workload.decode_tokens):
            for name, cache in caches.items():
                seconds[name] += decode_step_seconds(model, cache, int(window[-1]), 1)
            step_done()
    step, dynamic_step = (1e3 * statistics.median(seconds[name]) for name in ("paged", "dynamic"))
    return SpeedRow(
        model=experiment.model.name,
        format=format_name,
        page_size=pages.params.page_size,
        context=workload.window_tokens,
        step_ms=step,
        worst_step_ms=1e3 * max(seconds["paged"]),
        dynamic_step_ms=dynamic_step,
        ratio=step / dynamic_step,
        cache_bytes=pages.nbytes,
        dynamic_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in caches["dynamic"].layers),
        kl=agreement(predictions["dynamic"], predictions["paged"], window).kl.mean().item(),
    )


def _given(cache: Any, batch_size: int) -> Any:
    """A cache that is there already, as a maker of caches."""
    return cache


def speed_table(rows: Sequence[SpeedRow]) -> str:
    """Rows as one aligned plain-text table."""
    from kvcfg.results.table import aligned
    from kvcfg.units import readable_bytes

    header = ("model", "format", "page", "context", "ms/step", "worst", "DynamicCache", "ratio", "cache", "its", "KL")
    cells = [
        (
            row.model,
            row.format,
            str(row.page_size),
            str(row.context),
            f"{row.step_ms:.1f}",
            f"{row.worst_step_ms:.1f}",
            f"{row.dynamic_step_ms:.1f}",
            f"{row.ratio:.2f}",
            readable_bytes(row.cache_bytes),
            readable_bytes(row.dynamic_bytes),
            f"{row.kl:.1e}",
        )
        for row in rows
    ]
    note = "Both caches step in turn in one process; times mean little across machines, the ratio is what counts."
    return "\n".join([*aligned([header, *cells], num_left=2), "", note])
