"""From the tokens that an engine's cache is to hold to the bytes that kvcfg plans with."""

from __future__ import annotations

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.exporters.memory import share_used
from kvcfg.planning.plans import Plan, plan
from kvcfg.units import ceil_div


def bytes_for(experiment: ExperimentConfig, tokens: int, share: float | None = None) -> int:
    """Bytes of one device with which a replica holds that many tokens, rounded up to pages.

    Where layers keep windows or states, those take bytes for each sequence, and a number of tokens does not say of
    how many sequences. The share of memory that the engine may use does.

    Args:
        experiment: the config, whatever budget it states.
        tokens: tokens of one replica.
        share: what weights and cache take together of a device's memory; None if it is not known.
    """
    pages = ceil_div(tokens, plan(experiment).resolution.params.page_size)
    planned = _with(experiment, share=share)
    likely = planned.max_batch_size
    sizes = [_bytes_of(planned, pages, sequences) for sequences in (likely, likely - 1, likely + 1) if sequences > 0]
    fitting = [size for size in sizes if share is None or share_used(_with(experiment, size)) == share]
    return (fitting or sizes)[0]


def _bytes_of(planned: Plan, pages: int, sequences: int) -> int:
    params, workload = planned.resolution.params, planned.experiment.workload
    total = params.memory(pages, workload.max_batch_size or sequences, planned.max_seq_len).total
    return ceil_div(total, params.tensor_parallel_degree)


def _with(experiment: ExperimentConfig, size: int | None = None, share: float | None = None) -> Plan:
    changes: dict[str, int | float | None] = {"kv_cache_memory_bytes": size}
    if share is not None:
        changes["device_memory_utilization"] = share
    return plan(experiment.model_copy(update={"cache": experiment.cache.model_copy(update=changes)}))
