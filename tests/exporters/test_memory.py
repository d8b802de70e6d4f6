"""The five meanings of 0.9: planned bytes first, then what each engine counts in."""

from __future__ import annotations

from math import ceil

import pytest

from kvcfg.composition import compose
from kvcfg.exporters import export
from kvcfg.planning import plan
from kvcfg.units import GIB
from tests.exporters.cases import LLAMA

LIMITED = (*LLAMA, "workload.max_batch_size=8", "workload.max_seq_len=8192")


def test_bytes_are_those_of_the_plan() -> None:
    planned = plan(compose(LLAMA))
    assert export(compose(LLAMA), "vllm").settings["kv-cache-memory-bytes"] == planned.kv_bytes_per_device
    cache = export(compose(LLAMA), "trtllm").settings["kv_cache_config"]
    assert cache["max_gpu_total_bytes"] == planned.kv_bytes_per_device and cache["free_gpu_memory_fraction"] == 1


def test_tokens_are_those_of_the_plan() -> None:
    assert export(compose(LLAMA), "sglang").settings["max-total-tokens"] == plan(compose(LLAMA)).num_tokens


def test_stated_bytes_stay_as_they_are() -> None:
    asked = compose([*LLAMA, "cache.kv_cache_memory_bytes=8GiB"])
    assert export(asked, "vllm").settings["kv-cache-memory-bytes"] == 8 * GIB


def test_stated_bytes_become_a_share_where_an_engine_has_no_other_word() -> None:
    experiment = compose([*LLAMA, "cache.kv_cache_memory_bytes=8GiB"])
    share = export(experiment, "max").settings["model"]["kv_cache"]["device_memory_utilization"]
    planned = plan(experiment)
    taken = planned.kv_bytes_per_device + experiment.model.weight_bytes
    assert share == ceil(1e4 * taken / planned.budget.memory) / 1e4
    assert 8 * GIB - planned.bytes_per_page < planned.kv_bytes_per_device <= 8 * GIB


def test_share_of_max_is_the_one_asked_for() -> None:
    settings = export(compose([*LLAMA, "cache.device_memory_utilization=0.85"]), "max").settings
    assert settings["model"]["kv_cache"]["device_memory_utilization"] == 0.85


@pytest.mark.parametrize("engine", ["max", "sglang"])
def test_reserve_and_workload_lower_the_share(engine: str) -> None:
    settings = export(compose([*LIMITED, "devices.reserved_gib=4"]), engine).settings
    share = settings["mem-fraction-static"] if engine == "sglang" else settings["model"]["kv_cache"]
    share = share if isinstance(share, float) else share["device_memory_utilization"]
    assert 0.28 < share < 0.3


def test_small_workload_takes_small_memory() -> None:
    """8 sequences of 8192 tokens are 8 GiB of bfloat16, not what is left of an H100."""
    size = export(compose(LIMITED), "vllm").settings["kv-cache-memory-bytes"]
    assert 8 * GIB < size < 8.02 * GIB


def test_every_conversion_says_how() -> None:
    for engine in ("vllm", "sglang", "trtllm", "max"):
        conversion = export(compose(LLAMA), engine).conversions[0]
        assert conversion.key == "cache.device_memory_utilization" and conversion.asked == 0.9
        assert conversion.how.startswith("0.9 × 80 GiB − 15 GiB of weights = 57 GiB a device")
