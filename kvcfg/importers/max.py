"""`max serve` as a config; the other way round is `kvcfg/exporters/max.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcfg.exporters.max import DRAFTS, FORMATS
from kvcfg.exporters.stored import NVFP4
from kvcfg.importers.notes import Notes
from kvcfg.importers.words import DTYPES, count, take_drafts, take_format, take_model, take_tiers

_SAME = ("kv_cache_page_size", "enable_prefix_caching", "device_memory_utilization", "kv_cache_hash_seed")
_COPIES = "enable_dp_cross_replica_prefix_copy"

UNSIZED = "MAX sizes it itself, from the device; kvcfg needs a size"


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recipe as one mapping, as flags are; the drafter's own section stays a section."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("model", "runtime", "kv_cache", "speculative") and isinstance(value, Mapping):
            flat |= flattened(value)
        else:
            flat[name] = value
    return flat


def import_max(notes: Notes, version: str) -> None:
    """Take all of MAX's settings that are about the cache."""
    encoding = notes.take("quantization_encoding")
    usual = take_model(notes, notes.take("model_path", "model"), DTYPES.get(str(encoding)))
    for key in _SAME:
        if (value := notes.take(key)) is not None:
            notes.set(f"cache.{key}", value)
    if (copies := notes.take(_COPIES)) is not None:
        notes.set(f"cache.{_COPIES}", copies)
    name = notes.take("kv_cache_format")
    table = FORMATS[version] | {NVFP4: "float4_e2m1fn"}
    take_format(notes, "kv_cache_format", "float4_e2m1fn" if name == "float4_e2m1" else name, table, usual)
    _hash(notes, version)
    _devices(notes)
    if (length := notes.take("max_length")) is not None:
        notes.set("workload.max_seq_len", count(length))
    if (sequences := notes.take("max_batch_size")) is not None:
        notes.set("workload.max_batch_size", int(sequences))
    _tiers(notes)
    _drafts(notes)


def _hash(notes: Notes, version: str) -> None:
    name = notes.take("kv_cache_hash_algo")
    if name == "sha256":
        notes.set("cache.kv_cache_hash_algo", name)
    elif version != "26.4" or name is not None:
        how = "64 bits cannot tell all pages apart, and kvcfg has no such hash"
        notes.read_as("kv_cache_hash_algo", name or "ahash64", "cache.kv_cache_hash_algo", "sha256", how)


def _devices(notes: Notes) -> None:
    devices = notes.take("device_specs", "devices")
    replicas = int(notes.take("data_parallel_degree", default=1))
    if devices is None or devices == "gpu:all":
        if replicas > 1:
            notes.set("devices.data_parallel_degree", replicas)
        return
    text = str(devices)
    ids = devices if isinstance(devices, list) else [item for item in text.removeprefix("gpu").lstrip(":").split(",")]
    if text == "cpu":
        notes.overrides.append("devices=cpu")
    notes.set("devices.count", len(ids))
    notes.set("devices.data_parallel_degree", replicas)


def _tiers(notes: Notes) -> None:
    config = notes.take("kv_connector_config") or {}
    kind = notes.take("kv_connector") or config.get("type")
    if kind in (None, "null"):
        return
    if kind == "dkv":
        notes.set("cache.kv_connector", "dkv")
        notes.set("cache.kv_connector_config.block_store_endpoint", config.get("block_store_endpoint"))
        return
    host = config.get("host_offload_max_gb", config.get("host_kvcache_swap_space_gb"))
    disk = config.get("disk_offload_max_gb")
    if host is None:
        notes.leave("kv_connector_config", dict(config) or kind, UNSIZED)
        return
    on_disk = kind != "local" and disk != 0
    take_tiers(notes, host, config.get("disk_offload_dir") if on_disk else None, disk if on_disk else None)
    if config.get("use_disk_direct_io") or config.get("disk_offload_direct_io"):
        notes.set("cache.kv_connector_config.disk_offload_direct_io", True)


def _drafts(notes: Notes) -> None:
    method, number = notes.take("speculative_method"), notes.take("num_speculative_tokens")
    rest = {
        key: notes.take(key)
        for key in (
            "rejection_sampling_strategy", "synthetic_acceptance_rate", "use_relaxed_acceptance_for_thinking",
            "relaxed_topk", "relaxed_delta",
        )
    }  # fmt: skip
    if method is None:
        return
    if method not in (*DRAFTS, "standalone"):
        notes.leave("speculative_method", method, f"kvcfg has {', '.join(DRAFTS)}")
        return
    take_drafts(notes, method, number)
    for key, value in rest.items():
        if value is not None:
            notes.set(f"speculative.{key}", value)
    drafter = notes.take("draft_model")
    if drafter is not None:
        notes.leave("draft_model", drafter, "kvcfg knows a drafter by its layers alone")
