"""Exports to all engines as one table, and what each of them loses below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvcfg.errors import ConfigError
from kvcfg.exporters.engines import EngineVersion
from kvcfg.exporters.exported import Export
from kvcfg.planning.layout import aligned, paragraph
from kvcfg.units import readable_bytes

_HEAD = ["engine", "version", "page", "format", "memory", "not said", "replaced", "converted"]

_NAMES = {  # what the engines call the same thing, for the columns of the table
    "page": ("block-size", "page-size", "tokens_per_block", "kv_cache_page_size", "chunk_size"),
    "format": ("kv-cache-dtype", "dtype", "kv_cache_format", "LLAMA_ARG_CACHE_TYPE_K"),
}

_MEMORY: dict[str, Callable[[Any], str]] = {  # how each engine counts memory
    "kv-cache-memory-bytes": readable_bytes,
    "max_gpu_total_bytes": readable_bytes,
    "max-total-tokens": "{:,} tokens".format,
    "LLAMA_ARG_CTX_SIZE": "{:,} tokens".format,
    "device_memory_utilization": "{:g} of memory".format,
    "max_local_cpu_size": "{:g} GiB of host".format,
}


def engines_table(made: Mapping[EngineVersion, Export | ConfigError]) -> str:
    """One row an engine and version, with notes on what is lost, replaced or refused."""
    rows = [_row(key, item) for key, item in made.items()]
    notes = [line for key, item in made.items() for line in _notes(key, item)]
    return "\n".join([*aligned([_HEAD, *rows], "<<><>>>>", indent=0), "", *notes]).rstrip()


def _row(key: EngineVersion, item: Export | ConfigError) -> list[str]:
    if isinstance(item, ConfigError):
        return [*key, "", "refused", "", "", "", ""]
    counts = (item.losses, item.changes, item.conversions)
    flat = _flat(item.settings)
    named = [next((str(flat[name]) for name in names if name in flat), "") for names in _NAMES.values()]
    memory = next((words(flat[name]) for name, words in _MEMORY.items() if name in flat), "")
    return [*key, *named, memory, *(str(len(part)) for part in counts)]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All values by their last name; inner ones win, which are more about the cache."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat


def _notes(key: EngineVersion, item: Export | ConfigError) -> list[str]:
    title = f"{key.engine} {key.version}"
    if isinstance(item, ConfigError):
        texts = [f"refused, {problem}" for problem in item.problems]
    else:
        texts = [f"not said, {loss}" for loss in item.losses] + [f"replaced, {change}" for change in item.changes]
    return [line for text in texts for line in paragraph(f"{title}: {text}")]
