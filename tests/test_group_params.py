from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.config.cache import KVConnectorConfig, KVConnectorType
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.group_params import KVCacheParams, KVCacheQuantizationConfig, split_into_groups


def gpus(count: int) -> list[DeviceRef]:
    return [DeviceRef.GPU(index) for index in range(count)]


def params(**changes: Any) -> KVCacheParams:
    """32 layers of 8 heads of 128 in bfloat16 on one GPU, pages of 128."""
    given: dict[str, Any] = {
        "dtype": DType.bfloat16, "n_kv_heads": 8, "head_dim": 128, "num_layers": 32, "devices": gpus(1),
    }  # fmt: skip
    return KVCacheParams(**(given | changes))


def mla(**changes: Any) -> KVCacheParams:
    return params(n_kv_heads=128, head_dim=576, num_layers=61, is_mla=True, num_q_heads=128, **changes)


def refused(**changes: Any) -> list[str]:
    """The keys that are refused."""
    with pytest.raises(ConfigError) as error:
        params(**changes)
    return [problem.key for problem in error.value.problems]


# Bytes: figures of the reference for 32 layers x 8 heads x 128


@pytest.mark.parametrize(
    ("dtype", "scales", "bytes_per_token"),
    [
        (DType.bfloat16, None, 131_072),
        (DType.float8_e4m3fn, KVCacheQuantizationConfig(scale_source="unit"), 65_536),
        (DType.float8_e4m3fn, KVCacheQuantizationConfig(), 67_584),
        (DType.int8, KVCacheQuantizationConfig(), 67_584),
        (DType.int8, None, 65_536),
    ],
)
def test_bytes_per_token_are_those_of_the_reference(
    dtype: DType, scales: KVCacheQuantizationConfig | None, bytes_per_token: int
) -> None:
    assert params(dtype=dtype, kvcache_quant_config=scales).bytes_per_token == bytes_per_token


def test_mla_stores_one_latent_whatever_the_heads() -> None:
    assert mla().bytes_per_token == 61 * 576 * 2 == 70_272


def test_mla_latent_is_kept_on_every_device_of_a_replica() -> None:
    assert mla(devices=gpus(8)).bytes_per_token == 8 * 70_272


def test_mla_latent_is_kept_once_by_each_data_parallel_replica() -> None:
    assert mla(devices=gpus(8), data_parallel_degree=8).bytes_per_token == 70_272


def test_tensor_parallel_shards_share_the_bytes() -> None:
    assert params(devices=gpus(8)).bytes_per_block == params().bytes_per_block


def test_replicated_heads_cost_as_much_as_heads_of_their_own() -> None:
    four_heads = params(n_kv_heads=4, devices=gpus(8), allow_kv_head_replication=True)
    assert four_heads.bytes_per_block == params(devices=gpus(8)).bytes_per_block


def test_recipe_wins_over_dtype_and_scales() -> None:
    int8 = FORMATS["int8"]
    recipe = Recipe(int8, int8, "token_head", "dynamic", DType.float16)
    assert params(dtype=DType.int8, recipe=recipe).bytes_per_token == 32 * 8 * 2 * (128 + 2)


def test_bytes_count_keys_and_values_of_different_width() -> None:
    assert params(value_head_dim=64).bytes_per_token == 32 * 8 * (128 + 64) * 2


@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    dim=st.sampled_from([64, 128, 256]),
    layers=st.integers(1, 80),
    page=st.integers(1, 512),
    dtype=st.sampled_from([DType.float32, DType.bfloat16, DType.int8]),
    scale_dtype=st.sampled_from([DType.float32, DType.bfloat16, DType.float8_e8m0fnu]),
)
def test_block_holds_exactly_its_elements_and_scales(
    heads: int, dim: int, layers: int, page: int, dtype: DType, scale_dtype: DType
) -> None:
    built = params(
        n_kv_heads=heads, head_dim=dim, num_layers=layers, page_size=page, dtype=dtype,
        kvcache_quant_config=KVCacheQuantizationConfig(scale_dtype, 64),
    )  # fmt: skip
    elements, scales = 1, 1
    for length in built.shape_per_block:
        elements *= length
    for length in built.shape_per_scale_block:
        scales *= length
    stored = scales * scale_dtype.size_in_bytes if built.quantized_kv_cache else 0
    assert built.bytes_per_block == elements * dtype.size_in_bytes + stored


# Pages of a sequence


def test_full_layer_needs_pages_for_every_token() -> None:
    assert [params(page_size=16).pages_per_sequence(length) for length in (1, 16, 17)] == [1, 1, 2]


def test_drafts_need_room_beyond_the_longest_sequence() -> None:
    drafting = params(speculative_method="eagle", num_draft_tokens=3)
    assert (params().pages_per_sequence(512), drafting.pages_per_sequence(512)) == (4, 5)


def slots_in_reach(window: int, is_chunked: bool, slack: int, position: int) -> range:
    """Slots that must be stored while the token at a position is computed and `slack` drafts follow it."""
    first = position // window * window if is_chunked else max(0, position - window + 1)
    return range(first, position + slack + 1)


@given(
    window=st.integers(1, 70), page=st.integers(1, 40), length=st.integers(1, 200), drafts=st.integers(0, 2),
    is_chunked=st.booleans(),
)  # fmt: skip
def test_windowed_pages_hold_all_that_any_query_can_see(
    window: int, page: int, length: int, drafts: int, is_chunked: bool
) -> None:
    built = params(
        kind="chunked" if is_chunked else "sliding_window", window=window, page_size=page,
        num_draft_tokens=drafts, speculative_method="mtp" if drafts else None,
    )  # fmt: skip
    slack = built.spec_decode_cache_slack
    touched = max(
        len({slot // page for slot in slots_in_reach(window, is_chunked, slack, position)})
        for position in range(length)
    )
    assert touched <= built.pages_per_sequence(length)


@pytest.mark.parametrize(
    ("kind", "window", "page", "pages"),
    [
        ("sliding_window", 128, 16, 9),  # 128 tokens that start in the middle of a page
        ("sliding_window", 1, 16, 1),
        ("sliding_window", 129, 128, 2),
        ("sliding_window", 130, 128, 3),
        ("chunked", 8192, 128, 64),  # chunks start with a page
        ("chunked", 100, 16, 7),  # 96 is no multiple of 100: chunks start within pages
    ],
)
def test_windowed_pages_are_no_more_than_needed(kind: str, window: int, page: int, pages: int) -> None:
    assert params(kind=kind, window=window, page_size=page).pages_per_sequence(1_000_000) == pages


def test_window_longer_than_the_sequence_takes_what_the_sequence_takes() -> None:
    assert params(kind="sliding_window", window=4096, page_size=16).pages_per_sequence(20) == 2


def test_windowed_group_does_not_grow_with_context() -> None:
    windowed = params(kind="sliding_window", window=128)
    assert (windowed.grows, windowed.bytes_per_token) == (False, 0)


def test_linear_group_keeps_its_state_and_no_pages() -> None:
    linear = params(kind="linear", n_kv_heads=0, head_dim=0, state_bytes=1000, num_layers=3)
    assert (linear.bytes_per_block, linear.bytes_per_sequence(1), linear.bytes_per_sequence(9999)) == (0, 3000, 3000)


def test_shared_group_stores_nothing() -> None:
    assert params(kind="shared").bytes_per_sequence(9999) == 0


# Shards


def test_data_and_tensor_parallel_go_together() -> None:
    both = params(devices=gpus(8), data_parallel_degree=2)
    assert (both.tensor_parallel_degree, both.n_kv_heads_per_device) == (4, 2)


def test_devices_are_given_to_replicas_in_order() -> None:
    both = params(devices=gpus(4), data_parallel_degree=2)
    assert both.devices_per_replica == ((DeviceRef.GPU(0), DeviceRef.GPU(1)), (DeviceRef.GPU(2), DeviceRef.GPU(3)))


def test_fewer_heads_than_devices_are_refused_with_the_offer_to_replicate() -> None:
    with pytest.raises(ConfigError, match="allow_kv_head_replication=true"):
        params(n_kv_heads=4, devices=gpus(8))


def test_heads_that_do_not_divide_are_refused_even_with_replication() -> None:
    assert refused(n_kv_heads=3, devices=gpus(8), allow_kv_head_replication=True) == ["n_kv_heads"]


def test_copy_of_one_replica_keeps_everything_but_the_others() -> None:
    settings = KVConnectorConfig(disk_offload_dir="/pages")
    drafting = params(
        devices=gpus(4), data_parallel_degree=2, speculative_method="dflash", num_draft_tokens=4,
        kv_connector=KVConnectorType.tiered, kv_connector_config=settings,
    )  # fmt: skip
    one = drafting.copy_as_dp_1(1)
    assert one == replace(
        drafting,
        devices=(DeviceRef.GPU(2), DeviceRef.GPU(3)),
        data_parallel_degree=1,
        kv_connector_config=KVConnectorConfig(disk_offload_dir="/pages/replica_1"),
    )


def test_split_leaves_the_last_groups_short_or_empty() -> None:
    assert split_into_groups("abcde", 4) == [("a", "b"), ("c", "d"), ("e",), ()]


def test_split_into_no_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        split_into_groups("ab", 0)


# Refusals


@pytest.mark.parametrize(
    "name", ["n_kv_heads", "head_dim", "num_layers", "page_size", "data_parallel_degree", "num_q_heads"]
)
@pytest.mark.parametrize("value", [0, -1, "x", 1.5, True])
def test_dimensions_are_whole_numbers_of_at_least_one(name: str, value: object) -> None:
    assert refused(**{name: value}) == [name]


def test_every_bad_dimension_is_reported() -> None:
    assert refused(n_kv_heads=0, head_dim="x", page_size=-1) == ["n_kv_heads", "head_dim", "page_size"]


@pytest.mark.parametrize(
    "devices",
    [[], [DeviceRef.GPU(0), DeviceRef.GPU(0)], [DeviceRef.CPU(), DeviceRef.GPU(0)], ["gpu:0"]],
    ids=["none", "twice", "mixed", "names"],
)
def test_devices_are_distinct_and_of_one_type(devices: list[Any]) -> None:
    assert refused(devices=devices) == ["devices"]


def test_replicas_must_have_equal_numbers_of_devices() -> None:
    assert refused(devices=gpus(8), data_parallel_degree=3) == ["data_parallel_degree"]


def test_mla_needs_its_query_heads() -> None:
    assert refused(is_mla=True) == ["num_q_heads"]


def test_fp8_without_scales_names_the_choice_to_be_made() -> None:
    with pytest.raises(ConfigError, match=r'KVCacheQuantizationConfig\(scale_source="unit"\)'):
        params(dtype=DType.float8_e5m2)


def test_granularity_must_divide_head_dim() -> None:
    with pytest.raises(ConfigError, match=r"must divide head_dim 96\. Try: quantization_granularity=96"):
        params(dtype=DType.int8, head_dim=96, kvcache_quant_config=KVCacheQuantizationConfig())


def test_scales_of_a_type_that_cannot_scale_are_refused() -> None:
    config = KVCacheQuantizationConfig(scale_dtype=DType.int8)
    assert refused(dtype=DType.int8, kvcache_quant_config=config) == ["kvcache_quant_config.scale_dtype"]


def test_integers_that_hold_no_quantized_numbers_take_no_scales() -> None:
    assert refused(dtype=DType.uint8, kvcache_quant_config=KVCacheQuantizationConfig()) == ["dtype"]


@pytest.mark.parametrize("granularity", [0, -128, 1.0])
def test_granularity_is_a_whole_number_of_at_least_one(granularity: Any) -> None:
    with pytest.raises(ConfigError, match="quantization_granularity"):
        KVCacheQuantizationConfig(quantization_granularity=granularity)


def test_drafts_need_a_method() -> None:
    assert refused(num_draft_tokens=3) == ["num_draft_tokens"]


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="standalone, eagle, mtp or dflash"):
        params(speculative_method="medusa")


def test_windowed_layer_needs_a_window() -> None:
    assert refused(kind="sliding_window") == ["window"]


def test_params_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        params().page_size = 0  # type: ignore[misc]


def test_replaced_values_are_checked_again() -> None:
    with pytest.raises(ConfigError, match="page_size"):
        replace(params(), page_size=0)


def test_scales_of_a_cache_without_them_have_no_shape() -> None:
    with pytest.raises(ConfigError, match="scales"):
        _ = params().shape_per_scale_block


def test_page_of_two_widths_has_no_one_shape() -> None:
    with pytest.raises(ConfigError, match="value_head_dim"):
        _ = params(value_head_dim=64).shape_per_block


@pytest.mark.parametrize(
    ("method", "drafts", "per_step", "slack"),
    [(None, 0, 0, 0), ("eagle", 0, 1, 0), ("eagle", 3, 1, 10), ("mtp", 1, 1, 4), ("dflash", 8, 8, 26)],
)
def test_only_a_block_drafter_takes_a_slot_for_its_own_token(
    method: Any, drafts: int, per_step: int, slack: int
) -> None:
    built = params(speculative_method=method, num_draft_tokens=drafts)
    assert (built.num_draft_tokens_per_step, built.spec_decode_cache_slack) == (per_step, slack)
