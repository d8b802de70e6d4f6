"""What is wrong with a grid, told once for all the points that share it."""

from __future__ import annotations

from kvcfg.cli.report import report
from kvcfg.composition import grid


def test_single_run_is_told_a_line_a_problem() -> None:
    points = grid(["cache.kv_cache_page_size=0", "devices.count=0"])
    assert [line.partition(":")[0] for line in report(points).splitlines()] == [
        "cache.kv_cache_page_size=0",
        "devices.count=0",
    ]


def test_problem_that_points_share_is_told_once_with_the_first_of_them() -> None:
    lines = report(grid(["cache.kv_cache_page_size=0,16", "model=tiny,smollm2-135m"])).splitlines()
    assert lines[0] == "2 of 4 points cannot be; nothing was run"
    assert lines[1].startswith("  cache.kv_cache_page_size=0: must be a whole number")
    assert lines[2:] == ["    in 2 of 4 points, the first is cache.kv_cache_page_size=0 model=tiny"]


def test_problem_of_every_point_needs_no_example() -> None:
    assert report(grid(["devices.count=0", "model=tiny,smollm2-135m"])).endswith("    in every point")
