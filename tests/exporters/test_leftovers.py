"""Nothing that a config asks for is dropped without a word: it is said to the engine, or stands in the report.

LMCache alone is said to leave the device to the engine in front of it.
"""

from __future__ import annotations

import pytest

from kvcfg.composition import compose
from kvcfg.config.cache import KVCacheConfig
from kvcfg.config.devices import DevicesConfig
from kvcfg.config.quantization import QuantizationConfig
from kvcfg.config.speculative import SpeculativeConfig
from kvcfg.errors import ConfigError
from kvcfg.exporters import ENGINES, Export, export, versions
from tests.exporters.cases import LLAMA

TIERED = (
    "cache.kv_connector=tiered",
    "cache.kv_connector_config.host_kvcache_swap_space_gb=32",
    "cache.kv_connector_config.disk_offload_dir=/tmp/kv",
    "cache.kv_connector_config.disk_offload_max_gb=100",
)
TWO = ("devices.count=2", "devices.data_parallel_degree=2")
EAGLE = ("speculative=eagle",)

CHANGES = {  # a change of each key, and what it needs to mean anything
    "cache.kv_cache_page_size": ("cache.kv_cache_page_size=256",),
    "cache.enable_prefix_caching": ("cache.enable_prefix_caching=false",),
    "cache.kv_connector": TIERED,
    "cache.kv_connector_config": (*TIERED, "cache.kv_connector_config.disk_offload_direct_io=true"),
    "cache.device_memory_utilization": ("cache.device_memory_utilization=0.7",),
    "cache.kv_cache_format": ("cache.kv_cache_format=float8_e4m3fn", "quantization=fp8_unit"),
    "cache.kv_cache_memory_bytes": ("cache.kv_cache_memory_bytes=32GiB",),
    "cache.kv_cache_hash_algo": ("cache.kv_cache_hash_algo=blake3",),
    "cache.kv_cache_hash_seed": (f"cache.kv_cache_hash_seed='{'ab' * 32}'",),
    "cache.eviction": ("cache.eviction=fifo",),
    "cache.verify_prefix_tokens": ("cache.verify_prefix_tokens=true",),
    "cache.reuse_partial_pages": ("cache.reuse_partial_pages=true",),
    "cache.enable_dp_cross_replica_prefix_copy": (*TWO, "cache.enable_dp_cross_replica_prefix_copy=true"),
    "devices.count": ("devices.count=2",),
    "devices.data_parallel_degree": TWO,
    "devices.reserved_gib": ("devices.reserved_gib=8",),
    "devices.allow_kv_head_replication": ("devices.allow_kv_head_replication=false",),
    "speculative.speculative_method": EAGLE,
    "speculative.num_speculative_tokens": (*EAGLE, "speculative.num_speculative_tokens=5"),
    "speculative.rejection_sampling_strategy": (*EAGLE, "speculative.rejection_sampling_strategy=greedy"),
    "speculative.synthetic_acceptance_rate": (*EAGLE, "speculative.synthetic_acceptance_rate=0.5"),
    "speculative.use_relaxed_acceptance_for_thinking": (
        *EAGLE, "speculative.use_relaxed_acceptance_for_thinking=true",
    ),
    "quantization.granularity": ("cache.kv_cache_format=int8",),
    "quantization.scale_source": ("cache.kv_cache_format=float8_e4m3fn", "quantization.scale_source=static"),
    "quantization.scale_dtype": ("cache.kv_cache_format=int8", "quantization.scale_dtype=bfloat16"),
    "quantization.transform": ("cache.kv_cache_format=int8", "quantization.transform=hadamard"),
    "quantization.sink_tokens": ("cache.kv_cache_format=int4", "quantization.sink_tokens=1"),
    "quantization.open_page_format": ("cache.kv_cache_format=int4", "quantization.open_page_format=bfloat16"),
    "quantization.balance_rope": ("cache.kv_cache_format=int8", "quantization.balance_rope=true"),
    "quantization.layers": (
        "cache.kv_cache_format=int8", "quantization.layers=[{layers:[0,1],format:bfloat16}]",
    ),
}  # fmt: skip

SAID_BY_OTHERS = {
    "cache.config_file", "cache.section_name",  # where values come from
    "devices.name", "devices.kind", "devices.memory_gib", "devices.bandwidth_gb_s",  # facts, in the planned bytes
    "speculative.draft_layer_groups",  # facts of the drafter, in the planned bytes
    "speculative.config_file", "speculative.section_name",
    "speculative.relaxed_topk", "speculative.relaxed_delta",  # of the relaxed mode
    "quantization.quantization_granularity", "quantization.key_granularity",  # the format, or refused
    "quantization.key_quantization_granularity", "quantization.key_format", "quantization.value_format",
    "quantization.calibration", "quantization.experimental",  # where scales are, and a promise of the user's
}  # fmt: skip


SAID_WITH = {  # keys that a report names by another one
    "speculative.num_speculative_tokens": "speculative.speculative_method",
    "devices.reserved_gib": "reserved",
    "cache.kv_connector_config": "cache.kv_connector",
    "quantization.granularity": "cache.kv_cache_format",
}


def reported(made: Export) -> str:
    return "\n".join(map(str, (*made.losses, *made.conversions, *made.needs)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("key", CHANGES)
def test_what_is_asked_for_is_said_or_reported(key: str, engine: str) -> None:
    start = [*LLAMA, *(TIERED if engine == "lmcache" else ())]
    for version in versions(engine):
        before = export(compose(start), engine, version)
        try:
            made = export(compose([*start, *CHANGES[key]]), engine, version)
        except ConfigError as error:
            assert error.problems[0].fix, error
            continue
        if made.settings == before.settings and engine != "lmcache":
            assert key in reported(made) or SAID_WITH[key] in reported(made)


def test_every_key_is_among_them() -> None:
    groups = {"cache": KVCacheConfig, "devices": DevicesConfig, "speculative": SpeculativeConfig}
    groups["quantization"] = QuantizationConfig
    keys = {f"{group}.{name}" for group, model in groups.items() for name in model.model_fields}
    assert keys == CHANGES.keys() | SAID_BY_OTHERS


def test_default_config_loses_nothing_in_engines_that_have_pages() -> None:
    for engine in ("vllm", "sglang", "trtllm", "max"):
        assert export(compose(LLAMA), engine).losses == ()
