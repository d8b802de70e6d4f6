from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kvcfg.composition import compose
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.planning import fit, plan
from kvcfg.planning.fitting import Option

Composed = Callable[..., ExperimentConfig]

TOO_LARGE = [
    ("model=gemma-3-27b", "devices=rtx4090"),
    ("model=gemma-3-27b", "devices=rtx4090", "devices.count=2", "devices.memory_gib=20"),
    ("model=llama-3.1-8b", "devices=rtx4090", "workload=rag"),
    ("model=llama-3.1-8b", "devices=h100", "workload=chat", "cache.kv_cache_memory_bytes=4GiB"),
    ("model=llama-3.1-405b", "devices=h100x8", "workload=chat"),
    ("model=llama-4-scout", "devices=h100x8"),
    ("model=deepseek-v3", "devices=h100x8_dp2tp4"),
    ("model=deepseek-v3", "devices=rtx4090", "speculative=mtp"),
    ("model=qwen3-next-80b-a3b", "devices=l40s", "cache=int8", "quantization=int8"),
    ("model=mistral-7b-v0.1", "devices=rtx4090", "workload.max_batch_size=64", "cache.kv_cache_page_size=2048"),
    ("model=qwen3-235b-a22b", "devices=a100-80g", "devices.allow_kv_head_replication=false"),
    ("model=llama-3.3-70b", "devices=cpu", "devices.memory_gib=16"),
]
LARGE_ENOUGH = [
    ("model=llama-3.1-8b", "devices=h100x8"),
    ("model=llama-3.1-8b", "devices=h100x8", "workload=chat", "cache=int8"),
    ("model=gpt-oss-20b", "devices=h100", "workload.max_batch_size=2", "workload.max_seq_len=5000"),
    ("model=deepseek-v3", "devices=h200x8", "cache=fp8", "speculative=mtp", "workload=chat"),
    ("model=qwen2.5-7b", "devices=h100", "quantization=int8"),
]


def named(words: tuple[str, ...]) -> str:
    return " ".join(words)


def options_of(words: tuple[str, ...]) -> list[Option]:
    answer = fit(compose(words))
    return [*answer.options, *([answer.combination] if answer.combination else [])]


@pytest.mark.parametrize("words", TOO_LARGE, ids=named)
def test_every_answer_fits_when_it_is_pasted_behind_the_words_that_did_not(words: tuple[str, ...]) -> None:
    assert not plan(compose(words)).fits
    for option in options_of(words):
        pasted = plan(compose([*words, *option.overrides]))
        assert pasted.fits, option.overrides
        assert pasted.kv_bytes == option.plan.kv_bytes, option.overrides


@pytest.mark.parametrize("words", TOO_LARGE, ids=named)
def test_there_is_an_answer_to_everything_too_large(words: tuple[str, ...]) -> None:
    assert options_of(words)


@pytest.mark.parametrize("words", LARGE_ENOUGH, ids=named)
def test_every_headroom_fits_when_it_is_pasted(words: tuple[str, ...]) -> None:
    assert plan(compose(words)).fits
    for option in options_of(words):
        assert plan(compose([*words, *option.overrides])).fits, option.overrides


def test_longest_sequences_of_the_headroom_are_the_longest_that_fit() -> None:
    words = ("model=gpt-oss-20b", "devices=l40s", "workload.max_batch_size=24", "workload.max_seq_len=5000")
    longest = next(
        option.plan.max_seq_len for option in options_of(words) if "workload.max_seq_len" in option.change.values
    )
    assert 5000 < longest < 131072
    assert not plan(compose([*words, f"workload.max_seq_len={longest + 1}"])).fits


def test_most_sequences_of_the_headroom_are_the_most_that_fit() -> None:
    words = ("model=llama-3.1-8b", "devices=h100", "workload.max_batch_size=1", "workload.max_seq_len=5000")
    most = next(
        option.plan.max_batch_size for option in options_of(words) if "workload.max_batch_size" in option.change.values
    )
    assert not plan(compose([*words, f"workload.max_batch_size={most + 1}"])).fits


def test_headroom_names_the_smallest_devices_that_do(composed: Composed) -> None:
    answer = fit(composed("model=llama-3.1-8b", "devices=h100x8", "workload=chat", "workload.max_batch_size=4"))
    assert [option.overrides for option in answer.options][-2:] == [("devices.count=1",), ("devices=rtx4090",)]


def test_a_smaller_format_comes_before_devices(composed: Composed) -> None:
    answer = fit(composed("model=llama-4-scout", "devices=h100x8"))
    assert answer.options[0].overrides == ("cache.kv_cache_format=float8_e4m3fn",)


def test_a_recipe_that_was_asked_for_is_undone_with_its_format() -> None:
    words = ("model=qwen2.5-7b", "devices=h100", "quantization=int8")
    wider = next(option for option in options_of(words) if "cache.kv_cache_format=bfloat16" in option.overrides)
    assert "quantization.key_format=null" in wider.overrides


def test_the_same_devices_and_workload_are_kept_by_a_combination_where_that_is_possible(composed: Composed) -> None:
    combination = fit(composed("model=gemma-3-27b", "devices=rtx4090")).combination
    assert combination is not None
    assert combination.overrides == ("cache.kv_cache_format=float8_e4m3fn", "model.weight_bits=4.5")


def test_no_combination_where_one_setting_is_enough(composed: Composed) -> None:
    assert fit(composed("model=llama-4-scout", "devices=h100x8")).combination is None


def test_sequences_are_shortened_only_where_no_devices_hold_them(composed: Composed) -> None:
    answer = fit(composed("model=llama-3.1-405b", "devices=rtx4090", "workload.max_batch_size=900"))
    assert answer.options == ()
    assert answer.combination is not None
    assert answer.combination.overrides[-1].startswith("workload.max_seq_len=")


def test_settings_that_would_outlive_a_preset_are_restated() -> None:
    words = ("model=gemma-3-27b", "devices=rtx4090", "devices.memory_gib=20")
    preset = next(option for option in options_of(words) if "devices" in option.change.values)
    assert preset.overrides == ("devices=a100-80g", "devices.memory_gib=80")


def test_only_presets_that_are_given_are_proposed(composed: Composed) -> None:
    answer = fit(composed("model=gemma-3-27b", "devices=rtx4090"), presets={})
    assert not any("devices" in option.change.values for option in answer.options)


def test_answer_is_json(composed: Composed) -> None:
    values = json.loads(json.dumps(fit(composed("model=gemma-3-27b", "devices=rtx4090")).to_dict()))
    assert values["fits"] is False
    assert values["combination"]["overrides"] == ["cache.kv_cache_format=float8_e4m3fn", "model.weight_bits=4.5"]
