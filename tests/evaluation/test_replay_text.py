"""What people read of replays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcfg.evaluation.replay import Replay
from kvcfg.evaluation.replay_text import point_labels, replay_table

Points = list[tuple[tuple[str, ...], Replay]]
Sweep = Callable[..., Points]


def test_one_replay_is_a_line_a_capacity(sweep: Sweep) -> None:
    [(_, replay)] = sweep("cache.kv_cache_page_size=512", capacities=["16k", "1M", "unbounded"])
    lines = str(replay).splitlines()
    assert lines[0] == f"trace.jsonl: 150 requests, {replay.trace.input_tokens:,} prompt tokens"
    assert [line.split()[0] for line in lines[5:8]] == ["16k", "1M", "unbounded"]
    assert f"{100 * replay.rows[1].hit_rate:.2f}" in lines[6]


def test_sweep_is_a_line_a_point_with_what_differs(sweep: Sweep) -> None:
    points = sweep("cache.kv_cache_page_size=16,512", "cache.kv_cache_format=bfloat16,int8")
    lines = replay_table(points).splitlines()
    assert lines[2].split()[:4] == ["page", "format", "16k", "64k"]
    assert [line.split()[:2] for line in lines[4:8]] == [
        ["16", "bfloat16"], ["16", "int8"], ["512", "bfloat16"], ["512", "int8"],
    ]  # fmt: skip


def test_smaller_format_is_compared_with_the_wider_one(sweep: Sweep) -> None:
    points = sweep("cache.kv_cache_format=bfloat16,int8", capacities=["unbounded", "1GiB"])
    gain = 100 * (points[1][1].rows[-1].hit_rate - points[0][1].rows[-1].hit_rate)
    table = replay_table(points)
    assert gain > 0 and f"{gain:+.2f}" in table and "vs wider" in table


def test_formats_that_are_alike_are_not_compared(sweep: Sweep) -> None:
    assert "vs wider" not in replay_table(sweep("cache.eviction=lru,lfu"))


@pytest.mark.parametrize("tiers", [(), ("cache=offload",)])
def test_tables_fit_120_columns(sweep: Sweep, tiers: tuple[str, ...]) -> None:
    capacities = [f"{2**power}k" for power in range(24)]
    grid = ("cache.kv_cache_page_size=16,64", "cache.kv_cache_format=bfloat16,int8", "cache.eviction=lru,fifo")
    points = sweep(*grid, *tiers, capacities=capacities)
    texts = [replay_table(points), str(points[0][1])]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 120
    assert all(name in texts[0] for name in capacities)


def test_points_are_told_apart_by_what_they_override(sweep: Sweep) -> None:
    points = sweep("workload.max_batch_size=1,2", capacities=["plan"])
    assert point_labels(points) == [{"max_batch_size": "1"}, {"max_batch_size": "2"}]


def test_a_single_point_is_called_by_its_page_size(sweep: Sweep) -> None:
    assert point_labels(sweep()) == [{"page": "128"}]


def test_tiers_have_a_column_each(sweep: Sweep) -> None:
    table = replay_table(sweep("cache=offload", "cache.kv_cache_page_size=16,64"))
    assert table.count("device") == 1 and table.count("host") == 1
    assert "A page counts for the first tier that has it" in table
