"""What importers share: models by their weights, formats by an engine's names for them, parallel degrees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcfg.config.presets import preset_values
from kvcfg.exporters.servers import MODEL
from kvcfg.exporters.stored import Stored, recipe_of
from kvcfg.importers.notes import Notes
from kvcfg.units import parse_bytes

DTYPES = {"half": "float16", "float": "float32"} | {name: name for name in ("float16", "bfloat16", "float32")}

METHODS = {"eagle3": "eagle", "draft_model": "standalone"}


def take_model(notes: Notes, name: Any, dtype: Any = None) -> str | None:
    """Choose the preset of a model, or read its folder; returns what it computes in, None if that is not known."""
    presets = preset_values("model")
    named = [preset for preset, values in presets.items() if name is not None and values.get("id") == name]
    asked = DTYPES.get(str(dtype))
    if named:
        notes.overrides.append(f"model={named[0]}")
        usual = presets[named[0]].get("dtype")
        if asked is not None and asked != usual:
            notes.set("model.dtype", asked)
        return asked or usual
    if name is None or name == MODEL:
        usual = str(presets["smollm2-135m"]["dtype"])
        if asked is not None and asked != usual:
            notes.set("model.dtype", asked)
        return asked or usual
    notes.overrides.append("model=hf")
    notes.set("model.path" if Path(str(name)).expanduser().is_dir() else "model.id", str(name))
    if asked is not None:
        notes.set("model.dtype", asked)
    return asked


def take_format(notes: Notes, setting: str, name: Any, table: Mapping[Stored, str], usual: str | None) -> None:
    """Overrides for an element format by the engine's name for it; `auto` is what the model computes in."""
    if name in (None, "auto") or (name == usual and DTYPES.get(name) == usual):
        return
    stored = next((stored for stored, own in table.items() if own == name), None)
    if stored is None:
        known = ", ".join(dict.fromkeys(table.values()))
        notes.leave(setting, name, f"kvcfg stores nothing so; it knows {known}")
        return
    notes.set("cache.kv_cache_format", stored.format)
    for key, value in recipe_of(stored).items():
        notes.set(f"quantization.{key}", value)


def take_degrees(notes: Notes, tensor_parallel: int, data_parallel: int) -> None:
    """Devices in all and replicas."""
    notes.set("devices.count", tensor_parallel * data_parallel)
    notes.set("devices.data_parallel_degree", data_parallel)


def count(value: Any) -> int:
    """A count as engines read it: 32k is 32,000 and 32K is 32,768, a size 8GiB or 8GB.

    Raises:
        ValueError: if it is none.
    """
    text = str(value).strip()
    scale = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}.get(text[-1:], 0)
    if scale:
        return round(float(text[:-1]) * scale)
    return parse_bytes(text)


def take_tiers(notes: Notes, host_gib: float, disk_dir: str | None = None, disk_gib: float | None = None) -> None:
    """A tier in host memory, and one on disk behind it."""
    notes.set("cache.kv_connector", "local" if disk_dir is None else "tiered")
    notes.set("cache.kv_connector_config.host_kvcache_swap_space_gb", host_gib)
    if disk_dir is not None:
        notes.set("cache.kv_connector_config.disk_offload_dir", disk_dir)
        if disk_gib is not None:
            notes.set("cache.kv_connector_config.disk_offload_max_gb", disk_gib)


def take_drafts(notes: Notes, method: str, drafts: int | None) -> None:
    """Who drafts, and how many tokens."""
    notes.set("speculative.speculative_method", method)
    if drafts is not None:
        notes.set("speculative.num_speculative_tokens", drafts)
