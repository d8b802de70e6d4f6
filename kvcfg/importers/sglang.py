"""`sglang serve` as a config; the other way round is `kvcfg/exporters/sglang.py`."""

from __future__ import annotations

from kvcfg.exporters.sglang import DRAFTS, EVICTIONS, FORMATS, GB
from kvcfg.exporters.tiers import whole
from kvcfg.importers.notes import Notes
from kvcfg.importers.words import count, take_degrees, take_drafts, take_format, take_model, take_tiers
from kvcfg.units import GIB

PAGE_SIZE = 1
"""Tokens of a page where nothing is said, on most backends."""


def import_sglang(notes: Notes, version: str) -> None:
    """Take all of SGLang's settings that are about the cache."""
    usual = take_model(notes, notes.take("model_path", "model"), notes.take("dtype"))
    size = notes.take("page_size")
    if size is None:
        how = "what SGLang takes on most backends"
        notes.read_as("page-size", None, "cache.kv_cache_page_size", PAGE_SIZE, how)
    else:
        notes.set("cache.kv_cache_page_size", int(size))
    name = notes.take("kv_cache_dtype")
    take_format(notes, "kv-cache-dtype", "bf16" if name == "bfloat16" else name, FORMATS, usual)
    _memory(notes)
    notes.set("cache.enable_prefix_caching", not notes.take("disable_radix_cache", default=False))
    eviction = notes.take("radix_eviction_policy")
    if eviction in EVICTIONS:
        notes.set("cache.eviction", eviction)
    elif eviction is not None:
        notes.leave("radix-eviction-policy", eviction, f"kvcfg has {', '.join(EVICTIONS)}")
    ranks = int(notes.take("tp_size", "tensor_parallel_size", default=1))
    take_degrees(notes, ranks, int(notes.take("dp_size", "data_parallel_size", default=1)))
    if (length := notes.take("context_length")) is not None:
        notes.set("workload.max_seq_len", count(length))
    if (sequences := notes.take("max_running_requests")) is not None:
        notes.set("workload.max_batch_size", int(sequences))
    _tiers(notes, ranks)
    _drafts(notes)


def _memory(notes: Notes) -> None:
    tokens, share = notes.take("max_total_tokens"), notes.take("mem_fraction_static")
    if tokens is not None:
        notes.tokens = count(tokens)
        if share is not None:
            notes.share = float(share)
            how = "max-total-tokens is smaller, and decides"
            notes.note("mem-fraction-static", share, "cache.kv_cache_memory_bytes", how)
    elif share is not None:
        how = "the same share: of free memory, for weights and cache"
        notes.read_as("mem-fraction-static", share, "cache.device_memory_utilization", float(share), how)


def _tiers(notes: Notes, ranks: int) -> None:
    enabled = notes.take("enable_hierarchical_cache", "enable_hicache", default=False)
    size, storage = notes.take("hicache_size"), notes.take("hicache_storage_backend")
    if not enabled:
        return
    if not size:
        notes.leave("enable-hierarchical-cache", True, "its size is a ratio; kvcfg needs hicache-size")
        return
    host = whole(int(size) * GB * ranks / GIB)
    take_tiers(notes, host)
    how = f"GB (10^9 bytes) of each of {ranks} ranks; here GiB of the replica"
    notes.note("hicache-size", size, f"cache.kv_connector_config.host_kvcache_swap_space_gb={host}", how)
    if storage is not None:
        notes.leave("hicache-storage-backend", storage, "its folder stands in the environment: add it as overrides")


def _drafts(notes: Notes) -> None:
    algorithm = notes.take("speculative_algorithm")
    steps, verified = notes.take("speculative_num_steps"), notes.take("speculative_num_draft_tokens")
    width = notes.take("speculative_eagle_topk", default=1)
    if algorithm is None:
        return
    own = {its: own for own, its in DRAFTS.items()} | {"EAGLE3": "eagle"}
    method = own.get(str(algorithm).upper())
    if method is None or int(width) != 1:
        notes.leave("speculative-algorithm", algorithm, f"kvcfg has {', '.join(DRAFTS)}, one token a step")
        return
    drafts = verified if method == "dflash" else steps
    take_drafts(notes, method, None if drafts is None else int(drafts))
    if (model := notes.take("speculative_draft_model_path", "speculative_draft_model")) is not None:
        notes.leave("speculative-draft-model-path", model, "kvcfg knows a drafter by its layers alone")
