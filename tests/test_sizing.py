from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.config.cache import KVConnectorConfig, KVConnectorType
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import CapacityError, ConfigError
from kvcfg.params import KVCacheParams, MultiKVCacheParams
from kvcfg.sizing import (
    RequestSlots,
    compute_max_seq_len_fitting_in_cache,
    compute_num_device_blocks,
    compute_num_host_blocks,
    estimated_memory_size,
    max_lengths,
)
from kvcfg.units import GIB


def params(**changes: Any) -> KVCacheParams:
    """A page is 16 MiB: 32 layers of 8 heads of 128 in bfloat16, 128 tokens."""
    given: dict[str, Any] = {
        "dtype": DType.bfloat16, "n_kv_heads": 8, "head_dim": 128, "num_layers": 32, "devices": [DeviceRef.GPU(0)],
    }  # fmt: skip
    return KVCacheParams(**(given | changes))


def gpus(count: int) -> list[DeviceRef]:
    return [DeviceRef.GPU(index) for index in range(count)]


def test_blocks_are_those_that_fit_without_a_workload() -> None:
    assert compute_num_device_blocks(params(), GIB, None, None) == 64


def test_blocks_are_those_the_workload_can_use() -> None:
    assert compute_num_device_blocks(params(), GIB, 2, 300) == 2 * 3


def test_blocks_are_per_replica() -> None:
    split = params(devices=gpus(2), data_parallel_degree=2)
    assert compute_num_device_blocks(split, GIB, None, None) == 32


def test_pool_has_room_for_the_drafts_of_the_longest_sequence() -> None:
    drafting = params(speculative_method="eagle", num_draft_tokens=3)
    assert compute_num_device_blocks(drafting, GIB, 1, 512) == 5


@pytest.mark.parametrize(
    ("batch", "length", "blocks"), [(None, None, 63), (1, 512, 5), (64, 512, 64)], ids=["memory", "workload", "both"]
)
def test_null_page_is_budgeted_when_asked_for(batch: int | None, length: int | None, blocks: int) -> None:
    assert compute_num_device_blocks(params(), GIB, batch, length, include_null_block=True) == blocks


def test_windows_and_states_are_set_aside_first() -> None:
    windowed = params(kind="sliding_window", window=1024)
    both = MultiKVCacheParams.from_params(params(), windowed)
    pages_of_windows = 2 * windowed.pages_per_sequence(8192)
    assert compute_num_device_blocks(both, GIB, 2, 8192) == 64 - pages_of_windows


@given(
    memory=st.integers(1, 1 << 40), batch=st.integers(1, 512), length=st.integers(1, 1 << 20),
    dp=st.sampled_from([1, 2, 4, 8]), page=st.sampled_from([1, 16, 128]),
)  # fmt: skip
def test_blocks_of_all_replicas_fit_into_the_memory(memory: int, batch: int, length: int, dp: int, page: int) -> None:
    built = params(devices=gpus(8), data_parallel_degree=dp, page_size=page)
    try:
        blocks = compute_num_device_blocks(built, memory, batch, length)
    except CapacityError:
        assert memory // dp < built.bytes_per_block
        return
    assert blocks >= 1
    assert estimated_memory_size(built, memory, batch, length) == blocks * built.bytes_per_block * dp <= memory


@given(memory=st.integers(1 << 26, 1 << 36), drafts=st.integers(0, 5), dp=st.sampled_from([1, 2]))
def test_longest_sequence_fits_and_one_token_more_does_not(memory: int, drafts: int, dp: int) -> None:
    built = params(
        devices=gpus(2), data_parallel_degree=dp, num_draft_tokens=drafts,
        speculative_method="mtp" if drafts else None,
    )  # fmt: skip
    longest = compute_max_seq_len_fitting_in_cache(built, memory)
    available = memory // dp
    assert built.bytes_per_sequence(longest) <= available < built.bytes_per_sequence(longest + 1)


def test_longest_sequence_leaves_the_null_page_when_asked_for() -> None:
    assert compute_max_seq_len_fitting_in_cache(params(), GIB, include_null_block=True) == 63 * 128


def test_sequence_that_must_fit_and_does_not_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"8192 tokens needs 64 pages \(1 GiB\), 63 fit"):
        compute_num_device_blocks(params(), GIB - 1, 4, 8192, require_max_seq_len_fits=True)


def test_memory_below_one_page_is_refused_with_both_sizes() -> None:
    with pytest.raises(CapacityError, match=r"16 MiB.*a replica has 8 MiB"):
        compute_num_device_blocks(params(), 8 << 20, 1, 1)


def test_null_page_alone_is_no_pool() -> None:
    with pytest.raises(CapacityError, match="the null page and one page"):
        compute_max_seq_len_fitting_in_cache(params(), 16 << 20, include_null_block=True)


def test_negative_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="available_cache_memory=-1"):
        compute_num_device_blocks(params(), -1, 1, 1)


def test_empty_workload_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        compute_num_device_blocks(params(), GIB, 0, 0)
    assert [problem.key for problem in error.value.problems] == ["max_batch_size", "max_seq_len"]


def test_cache_that_does_not_grow_is_not_counted_in_pages() -> None:
    with pytest.raises(ConfigError, match="grow with context"):
        compute_max_seq_len_fitting_in_cache(params(kind="sliding_window", window=64), GIB)


def hosted(gib: float, **changes: Any) -> KVCacheParams:
    settings = KVConnectorConfig(host_kvcache_swap_space_gb=gib)
    return params(
        kv_connector=KVConnectorType.local, kv_connector_config=settings, host_kvcache_swap_space_gb=gib, **changes
    )


def test_host_blocks_are_those_that_the_host_memory_holds() -> None:
    assert compute_num_host_blocks(hosted(2)) == 128


def test_host_blocks_are_none_without_a_host_tier() -> None:
    assert compute_num_host_blocks(params()) == 0


def test_host_memory_below_one_page_is_refused() -> None:
    with pytest.raises(CapacityError, match="the host memory holds"):
        compute_num_host_blocks(hosted(0.001))


def test_copies_of_a_latent_take_host_memory_once_in_any_order() -> None:
    heads = hosted(1, devices=gpus(8))
    latent = hosted(1, devices=gpus(8), head_dim=576, is_mla=True, num_q_heads=16)
    page = heads.bytes_per_block + latent.bytes_per_block // 8
    both = {compute_num_host_blocks(MultiKVCacheParams(order)) for order in ((heads, latent), (latent, heads))}
    assert both == {GIB // page}


def test_plain_step_needs_a_slot_for_each_token() -> None:
    request = RequestSlots(processed=128, active=1)
    assert (request.slots, request.query_width, request.valid_length) == (129, 1, 129)


def test_drafting_step_needs_room_to_write_and_to_verify() -> None:
    request = RequestSlots(processed=512, active=488, num_draft_tokens=3, to_verify=3, maybe_accepted=3)
    assert (request.slots, request.query_width, request.valid_length) == (1009, 491, 1009)


@pytest.mark.parametrize(("is_block_draft", "slots"), [(False, 12), (True, 13)])
def test_block_draft_needs_a_slot_of_its_own(is_block_draft: bool, slots: int) -> None:
    request = RequestSlots(processed=9, active=1, num_draft_tokens=1, is_block_draft=is_block_draft)
    assert request.slots == slots


@pytest.mark.parametrize("memory", [-1, 0.5e9, None, "1GiB"])
def test_memory_that_is_no_number_of_bytes_is_refused(memory: Any) -> None:
    with pytest.raises(ConfigError, match="available_cache_memory"):
        compute_num_device_blocks(params(), memory, 1, 512)


@given(
    method=st.sampled_from(["standalone", "eagle", "mtp", "dflash"]),
    drafts=st.integers(1, 16),
    active=st.integers(1, 64),
    accepted=st.data(),
)
def test_pool_holds_every_slot_that_a_step_of_the_longest_sequence_asks_for(
    method: Any, drafts: int, active: int, accepted: st.DataObject
) -> None:
    drafting = params(speculative_method=method, num_draft_tokens=drafts)
    request = RequestSlots(
        processed=512 - active,
        active=active,
        num_draft_tokens=drafts,
        is_block_draft=method == "dflash",
        maybe_accepted=accepted.draw(st.integers(0, drafts)),
    )
    assert request.slots <= 512 + drafting.spec_decode_cache_slack


@pytest.mark.parametrize(
    ("steps", "rows"), [(0, []), (1, [[5, 40]]), (3, [[5, 40], [1, 41], [1, 42]])], ids=["none", "one", "three"]
)
def test_later_steps_compute_one_token_and_are_one_longer(steps: int, rows: list[list[int]]) -> None:
    assert max_lengths(5, 40, steps) == rows
