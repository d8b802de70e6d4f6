from __future__ import annotations

from typing import Any

import pytest

from kvcfg.config.cache import KVConnectorConfig, KVConnectorType
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError
from kvcfg.params import KVCacheParams, MultiKVCacheParams, table_columns

PAGE = 16
BATCH = 3
LENGTH = 100


def group(**changes: Any) -> KVCacheParams:
    given: dict[str, Any] = {
        "dtype": DType.bfloat16, "n_kv_heads": 2, "head_dim": 8, "num_layers": 4, "page_size": PAGE,
        "devices": (DeviceRef.GPU(0), DeviceRef.GPU(1)),
    }  # fmt: skip
    return KVCacheParams(**(given | changes))


FULL = group()
WINDOWED = group(kind="sliding_window", window=20, num_layers=6)
LINEAR = group(kind="linear", state_bytes=500, num_layers=2)
SHARED = group(kind="shared", num_layers=9)
HYBRID = MultiKVCacheParams.from_params(FULL, WINDOWED, LINEAR, SHARED)


def test_pool_pages_are_those_of_growing_groups() -> None:
    assert HYBRID.bytes_per_block == FULL.bytes_per_block


def test_token_grows_only_growing_groups() -> None:
    assert HYBRID.bytes_per_token == FULL.bytes_per_token == 4 * 2 * 2 * 8 * 2


def test_sequence_holds_pages_windows_and_states() -> None:
    pages = 7 * FULL.bytes_per_block + 3 * WINDOWED.bytes_per_block
    assert HYBRID.bytes_per_sequence(LENGTH) == pages + 2 * 500


def test_memory_itemises_what_a_replica_holds() -> None:
    memory = HYBRID.memory(num_pages=10, max_batch_size=BATCH, max_seq_len=LENGTH)
    assert memory.pages == 10 * FULL.bytes_per_block
    assert memory.null_pages == FULL.bytes_per_block + WINDOWED.bytes_per_block
    assert memory.windowed == BATCH * 3 * WINDOWED.bytes_per_block
    assert memory.states == BATCH * 2 * 500


def test_tables_and_lengths_are_there_twice_on_every_shard() -> None:
    one_shard = BATCH * (24 + 24 + 1) * 4  # 7 and 3 pages in tables of 24 columns, one length, int32
    assert HYBRID.memory(10, BATCH, LENGTH).page_tables == 2 * 2 * one_shard


@pytest.mark.parametrize(("pages", "columns"), [(0, 16), (1, 24), (8, 24), (9, 32), (16, 32)])
def test_table_has_room_to_read_in_eights_and_sixteen_entries_ahead(pages: int, columns: int) -> None:
    assert table_columns(pages) == columns


def test_groups_that_grow_share_the_table_of_the_first() -> None:
    params = MultiKVCacheParams.from_params(WINDOWED, FULL, LINEAR, WINDOWED, FULL)
    windowed, growing = WINDOWED.pages_per_sequence(1000), FULL.pages_per_sequence(1000)
    expected = (table_columns(windowed), table_columns(growing), table_columns(windowed))
    assert params.page_table_columns(1000) == expected


def test_memory_is_the_sum_of_its_items() -> None:
    memory = HYBRID.memory(10, BATCH, LENGTH)
    items = (memory.pages, memory.null_pages, memory.windowed, memory.states, memory.page_tables)
    assert memory.total == sum(items)


def test_drafter_has_its_part_of_every_page_and_of_the_null_page() -> None:
    target, drafter = (group(speculative_method="eagle", num_draft_tokens=2, role=role) for role in ("target", "draft"))
    alone = MultiKVCacheParams.from_params(target).memory(10, BATCH, LENGTH)
    both = MultiKVCacheParams.from_params(target, drafter).memory(10, BATCH, LENGTH)
    assert (both.pages, both.page_tables) == (alone.pages, alone.page_tables)
    assert both.draft_pages == 10 * drafter.bytes_per_block
    assert both.total - alone.total == 11 * drafter.bytes_per_block


@pytest.mark.parametrize("roles", [("draft",), ("draft", "target"), ("target", "draft", "target")])
def test_drafter_stands_after_the_model(roles: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="then those of its drafter"):
        MultiKVCacheParams.from_params(*(group(speculative_method="eagle", role=role) for role in roles))


def test_one_more_page_takes_one_more_block() -> None:
    more = HYBRID.memory(11, BATCH, LENGTH).total - HYBRID.memory(10, BATCH, LENGTH).total
    assert more == HYBRID.bytes_per_block


def test_layers_that_read_other_pages_add_nothing() -> None:
    without = MultiKVCacheParams.from_params(FULL, WINDOWED, LINEAR)
    assert HYBRID.memory(10, BATCH, LENGTH) == without.memory(10, BATCH, LENGTH)


def test_no_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one layer group"):
        MultiKVCacheParams.from_params()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"page_size": 32}, "page_size"),
        ({"data_parallel_degree": 2}, "data_parallel_degree"),
        ({"devices": (DeviceRef.GPU(2), DeviceRef.GPU(3))}, "devices"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"kv_connector": KVConnectorType.local}, "kv_connector"),
        ({"kv_connector_config": KVConnectorConfig(disk_offload_dir="/a")}, "kv_connector_config"),
        ({"host_kvcache_swap_space_gb": 2.0}, "host_kvcache_swap_space_gb"),
        ({"speculative_method": "eagle"}, "speculative_method"),
    ],
)
def test_groups_that_disagree_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        MultiKVCacheParams.from_params(FULL, group(**changes))
    assert [problem.key for problem in error.value.problems] == [key]
