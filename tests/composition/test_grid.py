"""A grid is exactly what composing each point gives, only sooner."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcfg
from kvcfg.composition import grid
from kvcfg.composition.composer import Composer
from kvcfg.composition.points import compose_point

GPU = ["model=llama-3.1-8b", "devices=h100x8"]

POOL = {
    "cache": ["fp8", "int8", "page16", "offload", "fp9"],
    "model": ["llama-3.1-8b", "smollm2-135m", "deepseek-v3", "gemma-3-1b", "hf", "lama"],
    "devices": ["h100", "h100x8", "rtx4090x8_dp2tp4", "cpu"],
    "quantization": ["none", "fp8", "int8", "default"],
    "speculative": ["none", "eagle"],
    "experiment": ["chat_h100", "rollout_h100x8", "int8_outliers"],
    "cache.kv_cache_page_size": ["16", "64", "0", "many", "null", "???", "${workload.num_windows}"],
    "cache.kv_cache_format": ["int8", "bfloat16", "INT8", "int9", "null"],
    "cache.kv_connector": ["local", "tiered", "null"],
    "cache.kv_connector_config": ["null", "{host_kvcache_swap_space_gb:4}"],
    "cache.kv_connector_config.host_kvcache_swap_space_gb": ["8", "0"],
    "cache.typo": ["1", "2"],
    "+cache.typo": ["1", "2"],
    "quantization.granularity": ["block", "token_head", "none"],
    "quantization.quantization_granularity": ["32", "48"],
    "devices.count": ["1", "3", "8", "0"],
    "model.layer_groups.0.n_kv_heads": ["1", "0", "8"],
    "model.layer_groups": ["null", "[{kind:full,num_layers:2,n_kv_heads:2,head_dim:8}]", "[{kind:full}]"],
    "workload.max_seq_len": ["1000", "999999"],
}


@st.composite
def sweeps(draw: st.DrawFn) -> list[str]:
    """Overrides of up to six points, good and bad, in any order."""
    keys = draw(st.lists(st.sampled_from(sorted(POOL)), min_size=1, max_size=4, unique=True))
    counts = draw(st.sampled_from([(1, 2, 1, 1), (3, 2, 1, 1), (2, 1, 2, 1), (1, 1, 1, 1), (1, 1, 2, 3)]))
    values = [draw(st.permutations(POOL[key]))[:count] for key, count in zip(keys, counts, strict=False)]
    return [f"{key}={','.join(chosen)}" for key, chosen in zip(keys, values, strict=True)]


@given(sweeps())
@settings(max_examples=25)
def test_point_is_what_compose_gives_errors_included(overrides: list[str]) -> None:
    composer = Composer()
    for point in grid(overrides):
        alone = compose_point(composer, point.overrides)
        assert (point.experiment, str(point.error)) == (alone.experiment, str(alone.error)), point.overrides


def test_points_come_in_the_order_of_hydras_sweeper() -> None:
    points = grid(["cache=fp8,int8", "cache.kv_cache_page_size=16,32", "model=tiny"])
    assert [point.overrides for point in points] == [
        ("cache=fp8", "cache.kv_cache_page_size=16", "model=tiny"),
        ("cache=fp8", "cache.kv_cache_page_size=32", "model=tiny"),
        ("cache=int8", "cache.kv_cache_page_size=16", "model=tiny"),
        ("cache=int8", "cache.kv_cache_page_size=32", "model=tiny"),
    ]


def test_no_sweep_is_a_grid_of_one() -> None:
    assert grid(["cache=fp8"])[0].experiment == kvcfg.compose(["cache=fp8"])


def test_range_and_glob_are_run_through() -> None:
    points = grid(["cache.kv_cache_page_size=range(16,65,16)", "model=glob(qwen3-*b,exclude=qwen3-next*)"])
    assert {"model=qwen3-8b", "model=qwen3-32b"} <= {point.overrides[1] for point in points}
    assert "model=qwen3-next-80b-a3b" not in {point.overrides[1] for point in points}
    assert {point.overrides[0] for point in points} == {f"cache.kv_cache_page_size={size}" for size in (16, 32, 48, 64)}


def test_later_override_of_a_key_counts() -> None:
    points = grid(["cache=fp8,int8", "cache=page16"])
    assert [point.overrides for point in points] == [("cache=page16",)]


def test_points_that_cannot_be_are_marked() -> None:
    points = grid([*GPU, "cache.kv_cache_page_size=0,16,5000,64"])
    assert [point.error is None for point in points] == [False, True, False, True]


def test_refused_preset_is_told_at_its_points_alone() -> None:
    points = grid(["model=lama-3.1-8b,llama-3.1-8b", "devices=h100x8,h100"])
    assert [point.error is None for point in points] == [False, False, True, True]


def test_experiment_that_writes_to_every_group_can_be_swept() -> None:
    points = grid(["experiment=chat_h100,rollout_h100x8", "cache=int8,page16"])
    assert [(point.experiment.model.name, point.experiment.cache.device_memory_utilization)
            for point in points if point.experiment] == [
        ("llama-3.1-8b", 0.9), ("llama-3.1-8b", 0.9), ("qwen3-8b", 0.6), ("qwen3-8b", 0.6),
    ]  # fmt: skip


def test_preset_that_writes_outside_its_group_is_composed_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "workload").mkdir()
    (tmp_path / "workload" / "small.yaml").write_text(
        "# @package _global_\ncache: {kv_cache_page_size: 16}\nworkload: {max_seq_len: 512}\n"
    )
    points = grid(["workload=small,chat", "cache=int8,fp8"], config_dir=tmp_path)
    sizes = [point.experiment.cache.kv_cache_page_size for point in points if point.experiment]
    assert sizes == [16, 16, 128, 128]


def test_preset_that_computes_from_another_group_is_composed_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "workload").mkdir()
    (tmp_path / "workload" / "full.yaml").write_text("max_seq_len: ${model.max_seq_len}\n")
    points = grid(["workload=full,default", "model=tiny,llama-3.1-8b"], config_dir=tmp_path)
    lengths = [point.experiment.workload.max_seq_len for point in points if point.experiment]
    assert lengths == [512, 131072, None, None]


def test_options_of_a_verb_come_with_each_point() -> None:
    points = grid(["gate.max_kl=0.1,0.2", "force=true"], config_name="eval")
    assert [(point.options.gate.max_kl, point.options.force) for point in points] == [(0.1, True), (0.2, True)]


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("cache.kv_cache_page_size=interval(1,9)", "has no values to run through"),
        ("model=glob(nothing*)", "matches none of"),
        ("a b", "write KEY=VALUE"),
    ],
)
def test_grid_that_cannot_be_laid_out_is_refused_whole(override: str, rule: str) -> None:
    with pytest.raises(kvcfg.ConfigError, match=rule):
        grid([override])


def test_thousand_points_take_as_many_compositions_as_there_are_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[list[str]] = []
    load = Composer._load
    monkeypatch.setattr(Composer, "_load", lambda self, lines: loads.append(lines) or load(self, lines))
    models = "model=llama-3.1-8b,qwen3-8b,llama-3.3-70b,mistral-nemo-12b,gemma-3-27b"
    points = grid([models, "devices=h100,h100x8,h200,b200", "cache.kv_cache_page_size=range(1,51)"])
    assert len(points) == len({point.overrides for point in points}) == 1000
    assert len(loads) == 1 + 5 + 4
    assert all(kvcfg.plan(point.experiment).num_pages >= 0 for point in points if point.experiment)
