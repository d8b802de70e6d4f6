"""LMCache: a YAML file for LMCACHE_CONFIG_FILE. It is the tiers behind an engine and says nothing of the device.

Checked against LMCache 0.5.6: `lmcache/v1/config.py`; a key that it does not know is only warned of.
"""

from __future__ import annotations

import json

from kvcfg.exporters.exported import Export
from kvcfg.exporters.servers import model_name
from kvcfg.exporters.sheet import Sheet
from kvcfg.exporters.tiers import tiers_of, whole
from kvcfg.planning.plans import Plan
from kvcfg.units import ceil_div

VERSIONS = ("0.5.6",)

CHUNK = 256
"""Tokens of a chunk unless a page is larger; a chunk is whole pages."""

EVICTIONS = {"lru": "LRU", "lfu": "LFU", "fifo": "FIFO"}
HASHES = {"sha256": "sha256_cbor", "blake3": "blake3"}


def export_lmcache(plan: Plan, version: str) -> Export:
    """The settings of LMCache for the tiers of a planned cache.

    Raises:
        ConfigError: if the cache has no tier that LMCache could be.
    """
    sheet = Sheet("lmcache", version, plan)
    _tiers(sheet)
    cache, page = sheet.experiment.cache, plan.resolution.params.page_size
    chunk = page * ceil_div(CHUNK, page)
    sheet.convert("cache.kv_cache_page_size", "chunk_size", chunk, f"whole pages, {CHUNK} tokens or more")
    sheet.settings = {"chunk_size": chunk, **sheet.settings}
    if cache.eviction in EVICTIONS:
        sheet.say("cache.eviction", cache_policy=EVICTIONS[cache.eviction])
    if cache.kv_cache_hash_algo in HASHES:
        sheet.say("cache.kv_cache_hash_algo", pre_caching_hash_algorithm=HASHES[cache.kv_cache_hash_algo])
    else:
        sheet.say(pre_caching_hash_algorithm="sha256_cbor")
        sheet.lose("cache.kv_cache_hash_algo", "sha256", "there is no such hash")
    _leave_to_the_engine(sheet)
    connector = json.dumps({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"})
    launch = ("env", "LMCACHE_CONFIG_FILE=lmcache.yaml", "vllm", "serve", model_name(sheet))
    sheet.need("The engine's own settings beside it: kvcfg export engine=vllm without the tiers.")
    return sheet.finish("lmcache.yaml", (*launch, "--kv-transfer-config", connector), "")


def _tiers(sheet: Sheet) -> None:
    tiers, ranks = tiers_of(sheet.experiment.cache), sheet.plan.resolution.devices.tensor_parallel_degree
    if tiers is None or tiers.host_gib is None:
        fix = "cache.kv_connector=local cache.kv_connector_config.host_kvcache_swap_space_gb=8"
        sheet.refuse("cache.kv_connector", "names no tier in host memory, and LMCache is nothing else", fix)
        return
    sheet.say("cache.kv_connector", local_cpu=True, max_local_cpu_size=whole(tiers.host_gib / ranks))
    if ranks > 1:
        how = f"each of {ranks} ranks has a part"
        key = "cache.kv_connector_config.host_kvcache_swap_space_gb"
        sheet.convert(key, "max_local_cpu_size", whole(tiers.host_gib / ranks), how)
    if tiers.disk_dir is not None and tiers.disk_gib is not None:
        sheet.say(local_disk=f"file://{tiers.disk_dir.rstrip('/')}/", max_local_disk_size=whole(tiers.disk_gib / ranks))
    if tiers.direct_io:
        sheet.say("cache.kv_connector_config.disk_offload_direct_io", extra_config={"use_odirect": True})


def _leave_to_the_engine(sheet: Sheet) -> None:
    """All of the device's own settings, once."""
    why = "LMCache sees no device; the engine in front of it says that"
    for key in ("cache.kv_cache_format", "cache.device_memory_utilization"):
        sheet.lose(key, "the engine's own", why)
    sheet.say(
        "devices.count", "devices.data_parallel_degree", "workload.max_batch_size", "workload.max_seq_len",
        "speculative.speculative_method", "cache.enable_prefix_caching",
    )  # fmt: skip
