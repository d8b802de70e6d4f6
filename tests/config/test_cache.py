from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kvcfg.config.cache import KVCacheConfig, KVConnectorConfig, KVConnectorType
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError, Problem
from kvcfg.params import KVCacheQuantizationConfig

CALL: dict[str, Any] = {"n_kv_heads": 8, "head_dim": 128, "num_layers": 32, "devices": [DeviceRef.GPU(0)]}
TIERED = {"host_kvcache_swap_space_gb": 8, "disk_offload_dir": "/pages", "disk_offload_max_gb": 100}


def places(**values: Any) -> list[tuple[Any, ...]]:
    """Where values are refused."""
    with pytest.raises(ValidationError) as error:
        KVCacheConfig(**values)
    return [item["loc"] for item in error.value.errors()]


def problems(**values: Any) -> dict[str, Problem]:
    """What a config refuses in its own words, by key."""
    with pytest.raises(ValidationError) as error:
        KVCacheConfig(**values)
    found = (problem for item in error.value.errors() for problem in item["ctx"]["problems"])
    return {problem.key: problem for problem in found}


def test_defaults_are_the_documented_ones() -> None:
    assert KVCacheConfig().model_dump() == {
        "config_file": None,
        "kv_cache_page_size": 128,
        "enable_prefix_caching": True,
        "kv_connector": None,
        "kv_connector_config": None,
        "device_memory_utilization": 0.9,
        "kv_cache_format": None,
        "kv_cache_memory_bytes": None,
        "kv_cache_hash_algo": "sha256",
        "kv_cache_hash_seed": None,
        "eviction": "lru",
        "verify_prefix_tokens": False,
        "reuse_partial_pages": False,
        "enable_dp_cross_replica_prefix_copy": True,
    }


@pytest.mark.parametrize("value", [0, -128, 4097, "many", None])
def test_page_size_is_1_to_4096(value: object) -> None:
    assert places(kv_cache_page_size=value) == [("kv_cache_page_size",)]


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_utilization_is_above_0_and_at_most_1(value: float) -> None:
    assert places(device_memory_utilization=value) == [("device_memory_utilization",)]


def test_every_bad_value_is_reported_at_once() -> None:
    assert len(places(kv_cache_page_size=0, device_memory_utilization=2, kv_cache_format="int9", typo=1)) == 4


def test_unknown_format_is_refused_with_the_nearest() -> None:
    assert problems(kv_cache_format="bfloat61")["kv_cache_format"].fix == "kv_cache_format=bfloat16"


@pytest.mark.parametrize("name", ["bfloat16", "BFLOAT16", "BFloat16"])
def test_format_is_known_whatever_its_case(name: str) -> None:
    assert KVCacheConfig(kv_cache_format=name).cache_dtype is DType.bfloat16


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [(None, DType.float32), ("float8_e4m3fn", DType.bfloat16), ("gptq", DType.bfloat16), ("q4_k", DType.float32)],
)
def test_weights_decide_the_dtype_where_no_format_does(encoding: str | None, dtype: DType) -> None:
    assert KVCacheConfig().cache_dtype_for(encoding) is dtype


def test_format_wins_over_the_weights() -> None:
    assert KVCacheConfig(kv_cache_format="int8").cache_dtype_for("float8_e4m3fn") is DType.int8


def test_unknown_encoding_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization_encoding=awq"):
        KVCacheConfig().cache_dtype_for("awq")


def test_budget_takes_a_unit() -> None:
    assert KVCacheConfig(kv_cache_memory_bytes="1.5GiB").kv_cache_memory_bytes == 3 << 29


def test_64_bit_hash_is_refused_with_the_others() -> None:
    assert "sha256, xxh3_128 or blake3" in problems(kv_cache_hash_algo="ahash64")["kv_cache_hash_algo"].rule


@pytest.mark.parametrize("seed", ["xyz", "0" * 63, "0" * 65, "g" * 64])
def test_hash_seed_is_64_hex_digits(seed: str) -> None:
    assert places(kv_cache_hash_seed=seed) == [("kv_cache_hash_seed",)]


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        KVCacheConfig().kv_cache_page_size = 64  # type: ignore[misc]


def test_equal_configs_hash_alike() -> None:
    assert len({KVCacheConfig(kv_cache_page_size=64), KVCacheConfig(kv_cache_page_size="64")}) == 1  # type: ignore[arg-type]


# Connectors


@pytest.mark.parametrize(
    ("connector", "missing"),
    [
        ("local", ["host_kvcache_swap_space_gb"]),
        ("tiered", ["host_kvcache_swap_space_gb", "disk_offload_dir", "disk_offload_max_gb"]),
        ("dkv", ["block_store_endpoint"]),
    ],
)
@pytest.mark.parametrize("settings", [None, {}])
def test_connector_names_all_the_settings_it_lacks(
    connector: str, missing: list[str], settings: dict[str, Any] | None
) -> None:
    found = problems(kv_connector=connector, kv_connector_config=settings)
    assert list(found) == [f"kv_connector_config.{name}" for name in missing]


@pytest.mark.parametrize("connector", ["local", "tiered", "dkv"])
def test_fixes_of_a_connector_make_it_valid(connector: str) -> None:
    fixes = dict(problem.fix.split("=") for problem in problems(kv_connector=connector).values() if problem.fix)
    settings = {key.removeprefix("kv_connector_config."): value for key, value in fixes.items()}
    assert KVCacheConfig(kv_connector=connector, kv_connector_config=settings).kv_connector == connector  # type: ignore[arg-type]


@pytest.mark.parametrize("connector", [None, "null"])
def test_no_connector_needs_no_settings(connector: Any) -> None:
    assert KVCacheConfig(kv_connector=connector).kv_connector in (None, KVConnectorType.null)


def test_host_tier_needs_prefix_caching() -> None:
    found = problems(kv_connector="tiered", kv_connector_config=TIERED, enable_prefix_caching=False)
    assert found["enable_prefix_caching"].fix == "enable_prefix_caching=true"


@pytest.mark.parametrize("name", ["host_kvcache_swap_space_gb", "disk_offload_max_gb"])
@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_tier_sizes_are_finite_and_above_zero(name: str, size: float) -> None:
    assert places(kv_connector_config={name: size}) == [("kv_connector_config", name)]


def test_sizes_of_tiers_are_never_assumed() -> None:
    settings = KVConnectorConfig()
    assert (settings.host_kvcache_swap_space_gb, settings.disk_offload_max_gb) == (None, None)


def test_mistyped_setting_is_refused() -> None:
    assert places(kv_connector_config={"disk_ofload_dir": "/x"}) == [("kv_connector_config", "disk_ofload_dir")]


@pytest.mark.parametrize("name", ["lmcache", "LOCAL", "", 0])
def test_unknown_connector_is_refused(name: object) -> None:
    assert places(kv_connector=name) == [("kv_connector",)]


# to_params


def test_to_params_copies_pages_and_tiers() -> None:
    config = KVCacheConfig(kv_cache_page_size=64, kv_connector="tiered", kv_connector_config=TIERED)  # type: ignore[arg-type]
    params = config.to_params(DType.bfloat16, **CALL)
    assert (params.page_size, params.enable_prefix_caching, params.host_kvcache_swap_space_gb) == (64, True, 8.0)


def test_to_params_passes_every_argument_on() -> None:
    params = KVCacheConfig().to_params(
        DType.int8,
        n_kv_heads=1,
        head_dim=576,
        num_layers=61,
        devices=[DeviceRef.GPU(index) for index in range(8)],
        data_parallel_degree=2,
        is_mla=True,
        num_q_heads=128,
        kvcache_quant_config=KVCacheQuantizationConfig(quantization_granularity=64),
        speculative_method="mtp",
        num_draft_tokens=1,
    )
    assert params.bytes_per_token == 61 * (576 + 9 * 4) * 4
    assert (params.num_q_heads_per_device, params.spec_decode_cache_slack) == (32, 4)


def test_format_that_contradicts_the_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_format=int8: differs from dtype=bfloat16"):
        KVCacheConfig(kv_cache_format="int8").to_params(DType.bfloat16, **CALL)


def test_format_that_agrees_with_the_dtype_is_taken() -> None:
    assert KVCacheConfig(kv_cache_format="Float32").to_params(DType.float32, **CALL).dtype is DType.float32


def test_to_params_checks_its_numbers() -> None:
    with pytest.raises(ConfigError, match="head_dim=x: must be a whole number"):
        KVCacheConfig().to_params(DType.bfloat16, **{**CALL, "head_dim": "x"})
