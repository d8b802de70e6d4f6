"""Errors of pydantic as problems: all at once, with full keys and fixes, and no false alarms among them."""

from __future__ import annotations

from typing import Any

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.problems import check, missing, refusal, unknown_key


def keys_of(data: dict[str, Any], refused: tuple[str, ...] = ()) -> list[str]:
    return [problem.key for problem in check(data, refused)[1]]


def test_good_data_is_an_experiment_without_problems() -> None:
    assert check({"cache": {"kv_cache_page_size": 64}})[1] == []


def test_every_group_tells_its_problems() -> None:
    data = {"cache": {"kv_cache_page_size": 0}, "devices": {"count": 0}, "workload": {"num_windows": 0}}
    assert keys_of(data) == ["cache.kv_cache_page_size", "devices.count", "workload.num_windows"]


def test_rules_speak_beside_a_refused_value_they_do_not_read() -> None:
    data = {"cache": {"kv_cache_page_size": 0}, "workload": {"max_seq_len": 10**9}}
    assert keys_of(data) == ["cache.kv_cache_page_size", "workload.max_seq_len"]


def test_rules_do_not_judge_a_stand_in() -> None:
    data = {"model": {"max_seq_len": 0}, "workload": {"max_seq_len": 10**9}}
    assert keys_of(data) == ["model.max_seq_len"]


def test_keys_refused_before_silence_their_rules_and_are_not_told_again() -> None:
    data = {"workload": {"max_seq_len": 10**9}}
    assert keys_of(data, refused=("workload.max_seq_len",)) == []


def test_data_with_a_refused_key_is_no_experiment() -> None:
    assert check({}, refused=("cache",))[0] is None


def test_check_of_a_whole_group_runs_beside_a_refused_value() -> None:
    data = {"cache": {"kv_cache_page_size": 0, "kv_connector": "dkv"}}
    assert keys_of(data) == ["cache.kv_cache_page_size", "cache.kv_connector_config.block_store_endpoint"]


def test_refused_setting_of_a_connector_is_told_once() -> None:
    data = {"cache": {"kv_connector": "tiered", "kv_connector_config": {"disk_offload_dir": "/d"}}}
    assert keys_of(data) == [
        "cache.kv_connector_config.host_kvcache_swap_space_gb",
        "cache.kv_connector_config.disk_offload_max_gb",
    ]


def test_bad_item_of_a_list_is_told_once_with_its_index() -> None:
    assert keys_of({"model": {"layer_groups": [{"kind": "full", "num_layers": 0, "head_dim": 64}]}}) == [
        "model.layer_groups.0.num_layers"
    ]


def test_bad_item_of_a_list_does_not_make_the_model_look_for_another_source() -> None:
    data = {
        "model": {"layer_groups": [{"kind": "full", "num_layers": 0, "head_dim": 64}], "id": "a/b", "package": None}
    }
    assert keys_of(data) == ["model.layer_groups.0.num_layers"]


def test_unknown_group_is_told() -> None:
    assert keys_of({"cahce": {}}) == ["cahce"]


def test_unknown_key_offers_the_nearest_with_the_value() -> None:
    assert unknown_key(ExperimentConfig, "cache.page_size", 64).fix == "cache.kv_cache_page_size=64"


def test_unknown_key_is_found_in_another_group() -> None:
    assert unknown_key(ExperimentConfig, "cache.granularity", "block").fix == "quantization.granularity=block"


def test_unknown_key_without_its_group_is_found() -> None:
    assert unknown_key(ExperimentConfig, "kv_cache_format", "int8").fix == "cache.kv_cache_format=int8"


def test_mistyped_group_keeps_the_rest_of_the_key() -> None:
    assert unknown_key(ExperimentConfig, "cahce.kv_cache_format", "int8").fix == "cache.kv_cache_format=int8"


def test_unknown_key_that_is_near_nothing_has_no_fix() -> None:
    assert unknown_key(ExperimentConfig, "cache.zzz", 1).fix is None


def test_missing_value_says_what_it_must_be() -> None:
    assert missing(ExperimentConfig, "cache.kv_cache_page_size").rule.startswith(
        "must be given; it must be a whole number"
    )


def test_refused_value_offers_the_nearest() -> None:
    assert refusal(ExperimentConfig, "devices.kind", "gpus").fix == "devices.kind=gpu"


def test_problem_of_a_validator_has_a_fix_with_the_full_key() -> None:
    problem = check({"cache": {"kv_cache_format": "int9"}})[1][0]
    assert (problem.key, problem.fix) == ("cache.kv_cache_format", "cache.kv_cache_format=int8")


def test_text_that_pydantic_cannot_read_says_how_to_write_it() -> None:
    problem = check({"cache": {"kv_cache_memory_bytes": "lots"}})[1][0]
    assert "8GiB" in problem.rule
