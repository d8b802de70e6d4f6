"""Export and import undo each other on what both kvcfg and the engine can say."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvcfg.composition import compose
from kvcfg.exporters import Export, export
from kvcfg.importers import read_config

FACTS = ("devices=h100",)
"""What no engine's settings say: the memory of a device."""

MODELS = ("llama-3.1-8b", "qwen3-8b", "gemma-3-12b", "deepseek-v2-lite")

PLAIN = ("cache.kv_cache_format=null",)
E4M3 = ("cache.kv_cache_format=float8_e4m3fn", "quantization.granularity=tensor", "quantization.scale_source=unit")
E5M2 = ("cache.kv_cache_format=float8_e5m2", "quantization.granularity=tensor", "quantization.scale_source=unit")
NVFP4 = (
    "cache.kv_cache_format=float4_e2m1fn", "quantization.granularity=block", "quantization.transform=none",
    "quantization.quantization_granularity=16", "quantization.scale_dtype=float8_e4m3fn",
)  # fmt: skip
INT8 = ("cache.kv_cache_format=int8",)

SAID = {  # by engine and version: pages, formats, disk, evictions
    ("vllm", "0.32"): ((16, 32, 128, 256), (PLAIN, E4M3, E5M2, INT8, NVFP4), ("local",), ("lru",)),
    ("sglang", "0.5.23"): ((1, 16, 64, 100), (PLAIN, E4M3, E5M2, NVFP4), ("local",), ("lru", "lfu", "priority")),
    ("max", "26.4"): ((128, 256), (PLAIN, E4M3), ("local", "tiered", "dkv"), ("lru",)),
    ("max", "26.7"): ((16, 128, 200), (PLAIN, E4M3, NVFP4), ("local", "tiered", "dkv"), ("lru",)),
}

TIERS = {
    "local": ("cache.kv_connector_config.host_kvcache_swap_space_gb={size}",),
    "tiered": (
        "cache.kv_connector_config.host_kvcache_swap_space_gb={size}",
        "cache.kv_connector_config.disk_offload_dir=/tmp/kv",
        "cache.kv_connector_config.disk_offload_max_gb=100",
    ),
    "dkv": ("cache.kv_connector_config.block_store_endpoint='tcp://127.0.0.1:7000'",),
}


@st.composite
def configs(draw: st.DrawFn, engine: str, version: str) -> list[str]:
    """Overrides that the engine can be told in full."""
    pages, formats, connectors, evictions = SAID[engine, version]
    model = draw(st.sampled_from(MODELS))
    latent = model == "deepseek-v2-lite"
    stored = draw(st.sampled_from([item for item in formats if not latent or item in (PLAIN, E4M3)]))
    replicas, shards = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
    overrides = [
        f"model={model}",
        f"devices.count={replicas * shards}",
        f"devices.data_parallel_degree={replicas}",
        f"cache.kv_cache_page_size={draw(st.sampled_from(pages))}",
        f"cache.eviction={draw(st.sampled_from(evictions))}",
        *stored,
    ]
    memory = draw(st.one_of(st.none(), st.integers(2**31, 2**34)))
    share = draw(st.sampled_from([0.8, 0.85, 0.9, 0.97]))
    overrides.append(
        f"cache.device_memory_utilization={share}" if memory is None else f"cache.kv_cache_memory_bytes={memory}"
    )
    connector = draw(st.sampled_from([None, *connectors]))
    if connector is None:
        overrides.append(f"cache.enable_prefix_caching={draw(st.booleans())}")
    else:
        size = draw(st.integers(8, 64))
        overrides += [f"cache.kv_connector={connector}", *(item.format(size=size) for item in TIERS[connector])]
    if draw(st.booleans()):
        overrides.append(f"workload.max_seq_len={draw(st.integers(512, 4096))}")
    if draw(st.booleans()):
        overrides.append(f"workload.max_batch_size={draw(st.integers(1, 32))}")
    if not latent and draw(st.booleans()):
        overrides += ["speculative=mtp", f"speculative.num_speculative_tokens={draw(st.integers(1, 5))}"]
    return overrides


def again(made: Export) -> Export:
    """What the file says, imported and exported once more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / made.file_name
        path.write_text(made.text, encoding="utf-8")
        read = read_config(str(path), made.engine, made.version, FACTS)
    return export(read.experiment, made.engine, made.version)


@pytest.mark.parametrize(("engine", "version"), SAID)
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_importing_an_export_and_exporting_it_is_the_same_file(data: st.DataObject, engine: str, version: str) -> None:
    made = export(compose([*FACTS, *data.draw(configs(engine, version))]), engine, version)
    assert again(made).text == made.text


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_command_line_says_what_the_file_says(data: st.DataObject, engine: str) -> None:
    version = {"vllm": "0.32", "sglang": "0.5.23"}[engine]
    made = export(compose([*FACTS, *data.draw(configs(engine, version))]), engine, version)
    assert made.flags is not None
    read = read_config(shlex.join(made.flags), overrides=FACTS)
    assert read.engine == engine
    assert export(read.experiment, engine, version).text == made.text


@pytest.mark.parametrize("version", ["26.4", "26.7"])
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_config_that_max_can_say_comes_back_whole(data: st.DataObject, version: str) -> None:
    """All but the budget in bytes, which MAX has no word for, and what a workload leaves of the share."""
    overrides = [item for item in data.draw(configs("max", version)) if "memory_bytes" not in item]
    asked = compose([*FACTS, *(item for item in overrides if not item.startswith("workload.max_batch"))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "max.yaml"
        path.write_text(export(asked, "max", version).text, encoding="utf-8")
        read = read_config(str(path), "max", version, FACTS)
    stated = {"kv_cache_format"} if asked.cache.kv_cache_format is None else set()  # MAX is told the model's own
    assert read.experiment.cache.model_dump(exclude=stated) == asked.cache.model_dump(exclude=stated)
    assert read.experiment.devices == asked.devices and read.experiment.speculative == asked.speculative
