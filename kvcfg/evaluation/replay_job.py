"""What is to be replayed for one experiment: capacities and tiers in pages, and what stands in the way.

Every capacity is that of one replica, whose cache serves the whole trace. Tiers are inclusive and lru: a page is
copied to host and disk when it is computed, a use counts in every tier, and it is found in the first that has it.
So all tiers together find what an lru cache of the largest of them finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvcfg.config.cache import KVConnectorType
from kvcfg.config.cache_sizes import CacheSize
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.verbs import ReplayOptions
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.trace_pages import check_page_size
from kvcfg.evaluation.traces import Trace
from kvcfg.planning import Plan, plan
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore
from kvcfg.units import GIB


class Tier(NamedTuple):
    """Memory behind the device.

    Attributes:
        name: host or disk.
        num_pages: pages that it holds of one replica.
    """

    name: str
    num_pages: int


@dataclass(frozen=True)
class ReplayJob:
    """One experiment and all that a replay of a trace needs to know of it.

    Attributes:
        experiment: what was asked for.
        options: how it is to be replayed.
        plan: what a page costs and what fits.
        tiers: what stands behind the device, the nearest first.
        row: a measured row of the same model, format and recipe; None if there is none.
    """

    experiment: ExperimentConfig
    options: ReplayOptions
    plan: Plan
    tiers: tuple[Tier, ...]
    row: ResultRow | None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.experiment.cache.kv_cache_page_size

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a page over all devices of a replica, in the layers that grow with the context."""
        return self.plan.bytes_per_page

    @property
    def format(self) -> str:
        """How elements are stored."""
        return self.plan.resolution.params.params[0].storage.format_name

    @property
    def recipe(self) -> str:
        """How pages are stored, in words."""
        return str(self.plan.resolution.params.params[0].storage)

    @property
    def head_first(self) -> bool:
        """Whether the first page of a prompt that is done is given up before its last one."""
        return self.options.release == "head_first"

    def num_pages(self, size: CacheSize) -> int | None:
        """Pages that a capacity is; None = unbounded."""
        if size.unit == "unbounded":
            return None
        if size.unit == "plan":
            return self.plan.num_pages
        return size.amount // (self.page_size if size.unit == "tokens" else self.bytes_per_page)

    def notes(self) -> Iterator[str]:
        """What to know when reading the figures."""
        replicas = self.plan.resolution.devices.data_parallel_degree
        if replicas > 1:
            yield f"Each of the {replicas} replicas has a cache of its own; here one serves the whole trace."
        if any(group.kind in ("sliding_window", "chunked") for group in self.experiment.model.layer_groups):
            yield f"{self.experiment.model.name}: windowed layers have pages of their own, which are not replayed."
        if self.experiment.cache.kv_connector is KVConnectorType.dkv:
            yield "A shared block store has no size in the config and is not replayed."
        if any(size.unit == "plan" for size in self.options.sizes) and not self.plan.num_pages:
            yield "The plan has no room for a page; `kvcfg fit` says what would make it fit."


def prepare(experiment: ExperimentConfig, options: ReplayOptions, trace: Trace) -> ReplayJob:
    """Check that a trace can be replayed for an experiment; nothing is run.

    Raises:
        ConfigError: with every reason why it cannot, or if the experiment cannot be resolved.
        KvcfgError: if the results file holds a line that is no row.
    """
    if problems := list(_problems(experiment, options)):
        raise ConfigError(problems)
    check_page_size(trace, experiment.cache.kv_cache_page_size)
    planned = plan(experiment)
    storage = planned.resolution.params.params[0].storage
    wanted = (experiment.model.name, storage.format_name, str(storage))
    rows = [
        row for row in ResultStore(options.results).rows().values() if (row.model, row.format, row.recipe) == wanted
    ]
    of_this_page = [row for row in rows if row.page_size == experiment.cache.kv_cache_page_size]
    row = next(reversed(of_this_page or rows), None)
    return ReplayJob(experiment, options, planned, tuple(_tiers(experiment, planned)), row)


def _problems(experiment: ExperimentConfig, options: ReplayOptions) -> Iterator[Problem]:
    cache, model = experiment.cache, experiment.model
    if not cache.enable_prefix_caching:
        rule = "must be true: without it nothing is ever found"
        yield Problem("cache.enable_prefix_caching", rule, False, "cache.enable_prefix_caching=true")
    kinds = {group.kind for group in model.layer_groups}
    if "linear" in kinds:
        yield Problem("model", "has linear layers, which cannot resume from a page: nothing is ever found", model.name)
    elif not kinds & {"full", "mla"}:
        yield Problem("model", "has no layer that keeps the whole context, so no prefix is found", model.name)
    if options.engine == "curve" and (cache.eviction != "lru" or options.running > 1):
        rule = f"is exact for cache.eviction=lru and running=1, not for {cache.eviction} and {options.running}"
        yield Problem("engine", rule, "curve", "engine=auto")


def _tiers(experiment: ExperimentConfig, planned: Plan) -> Iterator[Tier]:
    connector, settings = experiment.cache.kv_connector, experiment.cache.kv_connector_config
    if connector is None or settings is None or not connector.has_host_tier:
        return
    assert settings.host_kvcache_swap_space_gb is not None, "the config checks it"
    yield Tier("host", int(settings.host_kvcache_swap_space_gb * GIB) // planned.bytes_per_page)
    if connector is KVConnectorType.tiered:
        assert settings.disk_offload_max_gb is not None, "the config checks it"
        yield Tier("disk", int(settings.disk_offload_max_gb * GIB) // planned.bytes_per_page)
