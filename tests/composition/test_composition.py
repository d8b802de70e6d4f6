"""Overrides become a checked experiment, or one report with every problem and its mend."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcfg
from kvcfg.composition import overrides_of

GPU = ["model=llama-3.1-8b", "devices=h100x8"]


def problems_of(*overrides: str) -> dict[str, kvcfg.Problem]:
    with pytest.raises(kvcfg.ConfigError) as caught:
        kvcfg.compose(list(overrides))
    return {problem.key: problem for problem in caught.value.problems}


def test_defaults_of_the_yaml_are_those_of_the_models() -> None:
    assert kvcfg.compose() == kvcfg.ExperimentConfig()


def test_presets_and_values_are_composed() -> None:
    experiment = kvcfg.compose([*GPU, "cache=fp8", "cache.kv_cache_page_size=64"])
    assert (experiment.cache.kv_cache_format, experiment.cache.kv_cache_page_size) == ("float8_e4m3fn", 64)
    assert experiment.devices.tensor_parallel_degree == 8


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (["cache.kv_cache_page_siz=64"], "cache.kv_cache_page_siz", "cache.kv_cache_page_size=64"),
        (["model=lama-3.1-8b"], "model", "model=llama-3.1-8b"),
        (["cache.kv_cache_page_size=5000"], "cache.kv_cache_page_size", "cache.kv_cache_page_size=4096"),
        (["cache.kv_cache_page_size=many"], "cache.kv_cache_page_size", "cache.kv_cache_page_size=128"),
        (["cache.kv_cache_format=int9"], "cache.kv_cache_format", "cache.kv_cache_format=int8"),
        (["cache.device_memory_utilization=7"], "cache.device_memory_utilization", "cache.device_memory_utilization=1"),
    ],
)
def test_bad_value_names_key_and_a_mend_that_works(overrides: list[str], key: str, fix: str) -> None:
    problem = problems_of(*overrides)[key]
    assert problem.fix == fix
    kvcfg.compose([fix])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([*GPU, "devices.count=7"], "devices.count"),
        ([*GPU, "cache.kv_cache_format=int8", "quantization.granularity=none"], "quantization.granularity"),
        ([*GPU, "cache=int8", "quantization.granularity=block", "quantization.quantization_granularity=48"],
         "quantization.quantization_granularity"),
        ([*GPU, "cache.kv_connector=tiered"], "cache.kv_connector_config.disk_offload_dir"),
        ([*GPU, "speculative.num_speculative_tokens=3"], "speculative.num_speculative_tokens"),
        ([*GPU, "cache.kv_cache_format=int8", "quantization.key_format=bfloat16"], "quantization.key_format"),
        ([*GPU, "workload.max_seq_len=10000000"], "workload.max_seq_len"),
    ],
)  # fmt: skip
def test_groups_that_disagree_are_refused_by_key(overrides: list[str], key: str) -> None:
    found = problems_of(*overrides)
    assert any(key.startswith(name) or name.startswith(key) for name in found), found
    assert all(problem.rule for problem in found.values())


def test_every_problem_comes_in_one_report() -> None:
    found = problems_of(
        "model=lama-3.1-8b", "cache.kv_cache_page_size=0", "cache.kv_cache_format=int9", "workload.num_windows=none"
    )
    assert {"model", "cache.kv_cache_page_size", "cache.kv_cache_format", "workload.num_windows"} <= set(found)


def test_unreadable_override_is_told_as_written() -> None:
    with pytest.raises(kvcfg.ConfigError, match=re.escape("cache.kv_cache_page_size=16,32")):
        kvcfg.compose(["cache.kv_cache_page_size=16,32"])


def test_validate_names_keys_as_the_host_application_does() -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.create({"cache": {"kv_cache_page_size": 0}})
    with pytest.raises(
        kvcfg.ConfigError, match=r"kv\.cache\.kv_cache_page_size=0: .*Try: kv\.cache\.kv_cache_page_size"
    ):
        kvcfg.validate(config, prefix="kv")


VALUES = st.sampled_from(
    [
        "model=llama-3.1-8b",
        "model=gemma-3-27b",
        "devices=h100x8",
        "devices=cpu",
        "cache=fp8",
        "cache=int8",
        "cache.kv_cache_page_size=16",
        "cache.kv_cache_page_size=0",
        "cache.kv_cache_memory_bytes=8GiB",
        "quantization.scale_dtype=bfloat16",
        "speculative=eagle",
        "workload=chat",
        "workload.max_seq_len=4096",
        "workload.max_seq_len=true",
        "experiment=chat_h100",
    ]
)


@given(st.lists(VALUES, max_size=4, unique_by=lambda item: item.split("=")[0]))
@settings(max_examples=40)
def test_grid_point_is_what_compose_gives(overrides: list[str]) -> None:
    point = kvcfg.grid([*overrides, "cache.enable_prefix_caching=true,false"])[1]
    try:
        expected: kvcfg.ExperimentConfig | None = kvcfg.compose([*overrides, "cache.enable_prefix_caching=false"])
    except kvcfg.ConfigError as error:
        assert point.error is not None and str(point.error) == str(error)
        expected = None
    assert point.experiment == expected


def test_grid_marks_points_that_cannot_be() -> None:
    points = kvcfg.grid([*GPU, "cache.kv_cache_page_size=0,16,5000,64"])
    assert [point.error is None for point in points] == [False, True, False, True]
    assert points[1].overrides[-1] == "cache.kv_cache_page_size=16"


def test_grid_of_a_thousand_points_is_whole() -> None:
    models = "model=llama-3.1-8b,qwen3-8b,llama-3.3-70b,mistral-nemo-12b,gemma-3-27b"
    points = kvcfg.grid([models, "devices=h100,h100x8,h200,b200", "cache.kv_cache_page_size=range(1,51)"])
    assert len(points) == len({point.overrides for point in points}) == 1000
    assert all(kvcfg.plan(point.experiment).num_pages >= 0 for point in points if point.experiment)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*GPU, "cache=fp8", "cache.kv_cache_memory_bytes=8GiB", "workload=rag"],
        ["experiment=int8_outliers", "workload.text='/a folder/text (1).txt'"],
        ["model=gemma-2-9b", "devices=h100", "cache=int8", "speculative=mtp", "quantization.scale_dtype=float16"],
    ],
)
def test_overrides_of_an_experiment_compose_it_again(overrides: list[str]) -> None:
    experiment = kvcfg.compose(overrides)
    assert kvcfg.compose(overrides_of(experiment)) == experiment
