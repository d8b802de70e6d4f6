"""`vllm serve` as a config; the other way round is `kvcfg/exporters/vllm.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcfg.exporters.tiers import whole
from kvcfg.exporters.vllm import DRAFTS, FORMATS, HASHES
from kvcfg.importers.notes import Notes
from kvcfg.importers.words import METHODS, count, take_degrees, take_drafts, take_format, take_model, take_tiers
from kvcfg.units import GIB

BLOCK_SIZE = 16
"""Tokens of a block where nothing is said, on GPUs."""

UTILIZATION = 0.92


def import_vllm(notes: Notes, version: str) -> None:
    """Take all of vLLM's settings that are about the cache."""
    usual = take_model(notes, notes.take("model", "model_tag"), notes.take("dtype"))
    _pages(notes)
    name = notes.take("kv_cache_dtype")
    take_format(notes, "kv-cache-dtype", "fp8_e4m3" if name == "fp8" else name, FORMATS, usual)
    _skipped_layers(notes, usual)
    _memory(notes)
    _prefixes(notes)
    tensor_parallel, replicas = (int(notes.take(f"{kind}_parallel_size", default=1)) for kind in ("tensor", "data"))
    take_degrees(notes, tensor_parallel, replicas)
    if (length := notes.take("max_model_len")) is not None:
        notes.set("workload.max_seq_len", count(length))
    if (sequences := notes.take("max_num_seqs")) is not None:
        notes.set("workload.max_batch_size", int(sequences))
    _tiers(notes)
    _drafts(notes)


def _pages(notes: Notes) -> None:
    size = notes.take("block_size")
    if size is None:
        how = "what vLLM takes on GPUs; 128 on CPUs"
        notes.read_as("block-size", None, "cache.kv_cache_page_size", BLOCK_SIZE, how)
    else:
        notes.set("cache.kv_cache_page_size", int(size))


def _skipped_layers(notes: Notes, usual: str | None) -> None:
    skipped = notes.take("kv_cache_dtype_skip_layers")
    if not skipped or usual is None:
        return
    names = [str(name) for name in (skipped if isinstance(skipped, list) else [skipped])]
    numbers = [int(name) for name in names if name.isdigit()]
    items: list[dict[str, Any]] = [{"layers": numbers, "format": usual}] if numbers else []
    items += [{"kind": name, "format": usual} for name in names if not name.isdigit()]
    notes.set("quantization.layers", items)


def _memory(notes: Notes) -> None:
    size = notes.take("kv_cache_memory_bytes")
    share = notes.take("gpu_memory_utilization", "device_memory_utilization")
    if size is not None:
        notes.set("cache.kv_cache_memory_bytes", count(size))
        if share is not None:
            notes.leave("gpu-memory-utilization", share, "vLLM does not look at it beside kv-cache-memory-bytes")
        return
    how = "a share of all memory with activations in it; devices.reserved_gib keeps room for those"
    how = how if share is not None else f"vLLM's default, {how}"
    value = UTILIZATION if share is None else float(share)
    notes.read_as("gpu-memory-utilization", share, "cache.device_memory_utilization", value, how)


def _prefixes(notes: Notes) -> None:
    notes.set("cache.enable_prefix_caching", bool(notes.take("enable_prefix_caching", default=True)))
    name = notes.take("prefix_caching_hash_algo")
    if name is None:
        return
    own = next((own for own, its in HASHES.items() if name in (its, f"{its}_cbor")), None)
    if own is None:
        notes.leave("prefix-caching-hash-algo", name, "there is no such hash here")
    elif name != HASHES[own]:
        how = "the same hash of another encoding of the tokens"
        notes.read_as("prefix-caching-hash-algo", name, "cache.kv_cache_hash_algo", own, how)
    else:
        notes.set("cache.kv_cache_hash_algo", own)


def _tiers(notes: Notes) -> None:
    size, backend = notes.take("kv_offloading_size"), notes.take("kv_offloading_backend")
    transfer = notes.take("kv_transfer_config")
    if size is not None:
        take_tiers(notes, whole(float(size)))
        if backend not in (None, "native"):
            notes.leave("kv-offloading-backend", backend, "kvcfg's host tier is its own")
        return
    if transfer is None:
        return
    extra = transfer.get("kv_connector_extra_config", {}) if isinstance(transfer, Mapping) else {}
    tiers = [tier for tier in extra.get("secondary_tiers", []) if tier.get("type") == "fs"]
    host = extra.get("cpu_bytes_to_use")
    if host is None:
        notes.leave("kv-transfer-config", transfer, "kvcfg has no such connector")
        return
    take_tiers(notes, whole(float(host) / GIB), tiers[0].get("root_dir") if tiers else None)
    if tiers:
        key = "cache.kv_connector_config.disk_offload_max_gb"
        how = "vLLM's files have no limit, and kvcfg's tier needs one; as large as the host's unless stated"
        notes.read_as("secondary_tiers", None, key, whole(float(host) / GIB), how)


def _drafts(notes: Notes) -> None:
    config = notes.take("speculative_config")
    if not isinstance(config, Mapping):
        return
    method = str(config.get("method"))
    own = METHODS.get(method, method)
    if own not in DRAFTS:
        notes.leave("speculative-config", dict(config), f"kvcfg has {', '.join(DRAFTS)}")
        return
    take_drafts(notes, own, config.get("num_speculative_tokens"))
    if model := config.get("model"):
        notes.leave("speculative-config.model", model, "kvcfg knows a drafter by its layers alone")
