"""What every config may ask for beside the settings that all engines have, and what becomes of it where one has not."""

from __future__ import annotations

from typing import NamedTuple

from kvcfg.config.recipes import balances_rope, resolve_recipe
from kvcfg.exporters.tiers import tiers_of
from kvcfg.planning.plans import Plan

_LESS = "what is stored loses more than the recipe that was measured"


class Leftover(NamedTuple):
    """Something that was asked for: the key, what becomes of it where it cannot be said, and what is lacking there."""

    key: str
    becomes: str
    why: str


def leftovers(plan: Plan) -> list[Leftover]:
    """Everything in a config that an engine may not be able to say; an exporter strikes out what it could."""
    return [
        Leftover(key, becomes, why)
        for matters, key, becomes, why in (*_of_the_cache(plan), *_of_the_recipe(plan), *_of_the_rest(plan))
        if matters
    ]


def _of_the_cache(plan: Plan) -> list[tuple[bool, str, str, str]]:
    cache, devices = plan.experiment.cache, plan.experiment.devices
    reuses, tiers = cache.enable_prefix_caching, tiers_of(cache)
    copies = reuses and devices.data_parallel_degree > 1 and cache.enable_dp_cross_replica_prefix_copy
    has_hash = reuses and cache.kv_cache_hash_algo != "sha256"
    past_cache = tiers is not None and tiers.direct_io
    return [
        (not reuses, "cache.enable_prefix_caching", "the engine's own default", "there is no such switch"),
        (cache.eviction != "lru", "cache.eviction", "lru", "the order cannot be chosen"),
        (has_hash, "cache.kv_cache_hash_algo", "the engine's own", "the hash cannot be chosen"),
        (cache.kv_cache_hash_seed is not None, "cache.kv_cache_hash_seed", "null", "hashes take no such seed"),
        (cache.verify_prefix_tokens, "cache.verify_prefix_tokens", "false", "hashes are believed"),
        (cache.reuse_partial_pages, "cache.reuse_partial_pages", "false", "only whole pages are reused"),
        (copies, "cache.enable_dp_cross_replica_prefix_copy", "false", "a replica finds its own pages alone"),
        (tiers is not None, "cache.kv_connector", "null", "there is no such tier"),
        (past_cache, "cache.kv_connector_config.disk_offload_direct_io", "false", "files go through the page cache"),
    ]


def _of_the_recipe(plan: Plan) -> list[tuple[bool, str, str, str]]:
    recipe = resolve_recipe(plan.experiment)
    other_scales = recipe.is_scaled and recipe.granularity != "block" and recipe.scale_dtype.name != "float32"
    calibrated = recipe.scale_source == "static"
    as_they_are = "weights are used as they are, and keys with outliers lose more"
    return [
        (recipe.transform != "none", "quantization.transform", "none", _LESS),
        (recipe.sink_tokens > 0, "quantization.sink_tokens", "0", _LESS),
        (recipe.open_page is not None, "quantization.open_page_format", "that of full pages", _LESS),
        (balances_rope(plan.experiment), "quantization.balance_rope", "false", as_they_are),
        (other_scales, "quantization.scale_dtype", "float32", "scales have one type"),
        (calibrated, "quantization.scale_source", "unit", "calibrated scales cannot be given"),
    ]


def _of_the_rest(plan: Plan) -> list[tuple[bool, str, str, str]]:
    experiment, drafts, workload = plan.experiment, plan.experiment.speculative, plan.experiment.workload
    no_copies = not experiment.devices.allow_kv_head_replication
    strategy, rate = drafts.rejection_sampling_strategy, drafts.synthetic_acceptance_rate
    relaxed = drafts.use_relaxed_acceptance_for_thinking
    several = experiment.devices.data_parallel_degree > 1
    return [
        (experiment.devices.count > 1, "devices.count", "1", "it runs on one device"),
        (several, "devices.data_parallel_degree", "1", "one server is one replica: start as many"),
        (no_copies, "devices.allow_kv_head_replication", "true", "heads are copied where devices are more"),
        (drafts.speculative_method is not None, "speculative.speculative_method", "null", "nothing drafts"),
        (strategy is not None, "speculative.rejection_sampling_strategy", "the engine's own", "it cannot be chosen"),
        (rate is not None, "speculative.synthetic_acceptance_rate", "null", "drafts are really checked"),
        (relaxed, "speculative.use_relaxed_acceptance_for_thinking", "false", "there is no such mode"),
        (workload.max_batch_size is not None, "workload.max_batch_size", "as many as come", "it cannot be said"),
        (workload.max_seq_len is not None, "workload.max_seq_len", "the model's context", "it cannot be said"),
    ]
