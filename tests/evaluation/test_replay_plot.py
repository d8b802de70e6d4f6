"""The picture: which lines it has, what they are called, and when it is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import kvcfg
from kvcfg.evaluation import replay_plot
from kvcfg.evaluation.replay_plot import draw_replays

Points = list[Any]


def texts_of(svg: Path) -> list[str]:
    """Matplotlib names each text it draws as paths in a comment."""
    lines = svg.read_text().splitlines()
    return [line.strip()[5:-4] for line in lines if line.strip().startswith("<!-- ")]


@pytest.mark.parametrize("name", ["a.png", "new/folder/a.svg", "a.pdf"])
def test_picture_is_written(sweep: Any, tmp_path: Path, name: str) -> None:
    draw_replays(sweep(), str(tmp_path / name))
    assert (tmp_path / name).stat().st_size > 5000


def test_every_line_is_named(sweep: Any, tmp_path: Path) -> None:
    points = sweep("cache.kv_cache_format=bfloat16,int8", "cache.eviction=lru,lfu", capacities=["8k", "32k", "plan"])
    draw_replays(points, "a.svg")
    rate = f"{100 * points[0][1].rows[-1].hit_rate:.1f} %"
    named = {f"{name} {policy}  {rate}" for name in ("bfloat16", "int8") for policy in ("lru", "lfu")}
    assert named <= set(texts_of(tmp_path / "a.svg"))


@pytest.mark.parametrize(
    ("override", "axis", "told"),
    [
        ("cache.kv_cache_format=bfloat16,int8", "auto", "bytes"),
        ("cache.eviction=lru,lfu", "auto", "tokens"),
        ("cache.kv_cache_format=bfloat16,int8", "tokens", "tokens"),
    ],
)
def test_axis_counts_bytes_where_tokens_differ_in_them(
    sweep: Any, tmp_path: Path, override: str, axis: Any, told: str
) -> None:
    draw_replays(sweep(override, capacities=["8k", "32k"]), "a.svg", axis)
    assert f"cache of one replica, {told}" in texts_of(tmp_path / "a.svg")


def test_lines_that_coincide_are_one(sweep: Any, tmp_path: Path) -> None:
    draw_replays(sweep("cache.kv_cache_format=bfloat16,int8,float16"), "a.svg", "tokens")
    assert any(text.startswith("bfloat16/int8/float16  ") for text in texts_of(tmp_path / "a.svg"))


def test_plans_on_one_line_are_named(sweep: Any, tmp_path: Path) -> None:
    draw_replays(sweep("devices=h100,rtx4090"), "a.svg")
    assert {"h100", "rtx4090"} < set(texts_of(tmp_path / "a.svg"))


def test_lines_that_differ_are_not_one(sweep: Any, tmp_path: Path) -> None:
    draw_replays(sweep("cache.kv_cache_page_size=512,2048"), "a.svg")
    assert not any("/2048" in text for text in texts_of(tmp_path / "a.svg"))


def test_capacities_that_hold_nothing_are_left_out(sweep: Any, tmp_path: Path) -> None:
    draw_replays(sweep("cache.eviction=lfu", capacities=[1]), "a.svg")
    assert (tmp_path / "a.svg").exists()


def test_curves_of_many_corners_stay_small_files(sweep: Any, tmp_path: Path) -> None:
    points = sweep("cache.kv_cache_page_size=1", release="tail_first")
    draw_replays(points, "a.svg")
    assert len(points[0][1].curve.corners()) > 20_000
    assert (tmp_path / "a.svg").stat().st_size < 200_000


@pytest.mark.parametrize("heights", [[1, 1, 1], [0, 5, 5.1, 9.9, 10], [10, 10], [3]])
def test_names_stand_apart_in_their_order_and_inside(heights: list[float]) -> None:
    placed = replay_plot._apart(heights, 1.0, 10.0)
    assert all(above - below > 0.99 for below, above in pairwise(placed))
    assert placed[-1] <= 10


def test_a_place_that_cannot_be_written_is_told(sweep: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(kvcfg.KvcfgError, match=r"plot=file/a\.png cannot be written"):
        draw_replays(sweep(), "file/a.png")
