from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kvcfg.planning import Plan
from kvcfg.units import GIB, KIB, MIB

Planned = Callable[..., Plan]
LLAMA = ("model=llama-3.1-8b", "devices=h100x8", "cache.kv_cache_page_size=64")


def test_llama_on_eight_h100_takes_128_kib_per_token(planned: Planned) -> None:
    plan = planned(*LLAMA)
    assert (plan.bytes_per_token, plan.bytes_per_page) == (128 * KIB, 8 * MIB)


def test_llama_on_eight_h100_fills_nine_tenths_of_the_memory(planned: Planned) -> None:
    plan = planned(*LLAMA)
    budget = 8 * (int(80 * GIB * 0.9) - plan.experiment.model.weight_bytes // 8)
    tables = 2 * 8 * 4 * plan.max_batch_size * (131072 // 64 + 16 + 1)
    assert plan.num_pages == (budget - tables) // (8 * MIB) - 1
    assert plan.max_sequences == plan.num_pages // 2048 == 35


@pytest.mark.parametrize(
    ("model", "kib_per_token"),
    [
        ("smollm2-135m", 22.5),
        ("llama-2-7b", 512),
        ("llama-3.3-70b", 320),
        ("llama-4-scout", 48),
        ("mistral-7b-v0.1", 0),
        ("qwen2.5-72b", 320),
        ("qwen3-next-80b-a3b", 24),
        ("gemma-3-1b", 4),
        ("gemma-3-27b", 80),
        ("gemma-4-31b", 80),
        ("gpt-oss-20b", 24),
        ("gpt-oss-120b", 36),
        ("deepseek-v3", 70272 / 1024),
        ("glm-4.7-flash", 52.875),
    ],
)
def test_a_token_takes_what_is_published_in_bfloat16_on_one_device(
    planned: Planned, model: str, kib_per_token: float
) -> None:
    assert planned(f"model={model}", "devices=mi300x").bytes_per_token == kib_per_token * KIB


@pytest.mark.parametrize(
    ("words", "bytes_per_token"),
    [
        ("cache.kv_cache_format=bfloat16", 131072),
        ("quantization=fp8_unit", 65536),
        ("cache.kv_cache_format=float8_e4m3fn", 67584),
        ("cache.kv_cache_format=int8", 67584),
        ("cache.kv_cache_format=float32", 262144),
    ],
)
def test_formats_of_llama_cost_elements_and_scales(planned: Planned, words: str, bytes_per_token: int) -> None:
    assert planned("model=llama-3.1-8b", "devices=h100", words).bytes_per_token == bytes_per_token


def test_a_latent_is_kept_on_every_device_of_a_replica(planned: Planned) -> None:
    one, eight = planned("model=deepseek-v3", "devices=h200"), planned("model=deepseek-v3", "devices=h200x8")
    assert eight.bytes_per_token == 8 * one.bytes_per_token == 8 * 70272


def test_replicas_of_a_latent_keep_one_copy_each(planned: Planned) -> None:
    assert planned("model=deepseek-v3", "devices=h200x8_dp8").bytes_per_token == 70272


def test_four_heads_on_eight_devices_cost_as_much_as_eight_heads(planned: Planned) -> None:
    four, eight = (planned(f"model={name}", "devices=h100x8") for name in ("qwen3-30b-a3b", "qwen3-8b"))
    per_layer = [plan.bytes_per_token / plan.experiment.model.num_layers for plan in (four, eight)]
    assert four.experiment.model.layer_groups[0].n_kv_heads == 4
    assert per_layer[0] == per_layer[1]


def test_windowed_layers_cost_per_sequence_and_not_per_token(planned: Planned) -> None:
    words = ("model=gemma-3-27b", "devices=h100", "workload.max_batch_size=2")
    short, long = planned(*words, "workload.max_seq_len=4096"), planned(*words, "workload.max_seq_len=65536")
    windowed = short.breakdown()["windowed_pages"]
    assert windowed == long.breakdown()["windowed_pages"] == 2 * 9 * 128 * 52 * 2 * 16 * 128 * 2
    assert long.breakdown()["pages"] == 16 * short.breakdown()["pages"] == 2 * 65536 * 80 * KIB


def test_a_window_longer_than_the_sequence_costs_no_more_than_the_sequence(planned: Planned) -> None:
    plan = planned("model=mistral-7b-v0.1", "devices=h100", "workload.max_batch_size=1", "workload.max_seq_len=1024")
    assert plan.breakdown()["windowed_pages"] == 1024 * 128 * KIB


def test_linear_layers_keep_one_state_per_sequence(planned: Planned) -> None:
    plan = planned("model=qwen3-next-80b-a3b", "devices=mi300x", "workload.max_batch_size=5")
    linear = next(group for group in plan.experiment.model.layer_groups if group.kind == "linear")
    assert plan.breakdown()["linear_states"] == 5 * linear.num_layers * (linear.state_bytes or 0) > 0


def test_shared_layers_store_nothing(planned: Planned) -> None:
    shared = "{kind:shared,num_layers:9,n_kv_heads:8,head_dim:128}"
    full = "{kind:full,num_layers:4,n_kv_heads:8,head_dim:128}"
    words = ("model=llama-3.1-8b", "devices=h100")
    with_shared = planned(*words, f"model.layer_groups=[{full},{shared}]")
    without = planned(*words, f"model.layer_groups=[{full}]")
    assert with_shared.kv_bytes == without.kv_bytes
    assert with_shared.layer_groups()[1]["bytes_per_block"] == 0


def test_a_model_that_only_looks_back_a_window_has_no_growing_pages(planned: Planned) -> None:
    plan = planned("model=mistral-7b-v0.1", "devices=l40s")
    assert (plan.num_pages, plan.bytes_per_token) == (0, 0)
    assert plan.num_tokens == plan.max_sequences * plan.max_seq_len > 0


def test_breakdown_adds_up_to_what_an_allocation_takes(planned: Planned) -> None:
    for words in (LLAMA, ("model=gemma-3-27b", "devices=h100"), ("model=qwen3-next-80b-a3b", "devices=h100x8")):
        plan = planned(*words)
        memory = plan.resolution.params.memory(plan.num_pages, plan.max_batch_size, plan.max_seq_len)
        assert sum(plan.breakdown().values()) == plan.kv_bytes == memory.total


def test_scales_are_a_thirty_third_of_an_8_bit_cache_with_heads_of_128(planned: Planned) -> None:
    plan = planned("model=llama-3.1-8b", "devices=h100", "cache.kv_cache_format=int8")
    stored = plan.breakdown()["pages"] + plan.breakdown()["null_pages"]
    assert plan.included()["scales"] * 33 == stored


def test_drafts_take_pages_of_every_sequence(planned: Planned) -> None:
    words = ("model=llama-3.1-8b", "devices=h100", "workload.max_batch_size=8", "workload.max_seq_len=8192")
    plain, drafting = planned(*words), planned(*words, "speculative=eagle")
    assert drafting.included()["draft_slack"] == 8 * drafting.bytes_per_page
    assert drafting.breakdown()["pages"] - plain.breakdown()["pages"] == 8 * plain.bytes_per_page


def test_a_drafter_adds_its_layers_to_every_page(planned: Planned) -> None:
    words = ("model=llama-3.1-8b", "devices=h100", "workload.max_batch_size=8", "workload.max_seq_len=8192")
    plain, drafting = planned(*words), planned(*words, "speculative=eagle")
    one_layer = plain.bytes_per_page // 32
    assert drafting.bytes_per_page == plain.bytes_per_page + one_layer
    assert drafting.breakdown()["draft_pages"] == drafting.num_pages * one_layer
    assert [group["role"] for group in drafting.layer_groups()] == ["target", "draft"]


@pytest.mark.parametrize("method", ["standalone", "eagle", "mtp", "dflash"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-3-27b", "deepseek-v3", "mistral-7b-v0.1"])
def test_every_preset_of_drafting_plans_to_the_byte(planned: Planned, model: str, method: str) -> None:
    plan = planned(f"model={model}", "devices=h200x8", f"speculative={method}")
    params = plan.resolution.params
    assert [group.role for group in params.params][-1] == "draft"
    assert len(params.page_table_columns(1000)) == 1 + sum(not group.grows for group in params.params)
    assert sum(plan.breakdown().values()) == plan.kv_bytes > plan.breakdown()["draft_pages"] > 0


def test_told_layers_of_a_drafter_show_in_what_was_resolved(planned: Planned) -> None:
    words = ("model=llama-3.1-8b", "devices=h100", "speculative.speculative_method=mtp")
    (group,) = planned(*words).to_dict()["resolved"]["speculative"]["draft_layer_groups"]
    assert (group["kind"], group["num_layers"], group["n_kv_heads"], group["head_dim"]) == ("full", 1, 8, 128)


def test_a_linear_state_turns_prefix_caching_off_and_says_so(planned: Planned) -> None:
    plan = planned("model=qwen3-next-80b-a3b", "devices=h100x8")
    choice = next(item for item in plan.choices if item.key == "cache.enable_prefix_caching")
    assert (choice.requested, choice.resolved) == (True, False)
    assert not plan.resolution.params.enable_prefix_caching


def test_a_hash_that_can_be_forged_is_noted_where_prefixes_are_shared(planned: Planned) -> None:
    words = ("model=llama-3.1-8b", "devices=h100", "cache.kv_cache_hash_algo=xxh3_128")
    assert "sha256" in " ".join(planned(*words).notices)
    assert planned(*words, "cache.enable_prefix_caching=false").notices == planned(*words[:2]).notices == ()


def test_pool_is_no_larger_than_the_workload_can_use(planned: Planned) -> None:
    plan = planned("model=llama-3.1-8b", "devices=h100", "workload.max_batch_size=2", "workload.max_seq_len=1000")
    assert plan.num_pages == 2 * 8
    assert plan.max_sequences > 400


def test_total_counts_all_replicas(planned: Planned) -> None:
    plan = planned("model=llama-3.1-8b", "devices=h100x8_dp2tp4", "workload=chat")
    total = plan.to_dict()["total"]
    assert total["num_pages"] == 2 * plan.num_pages
    assert total["kv_bytes"] == 2 * plan.kv_bytes == total["kv"]


def test_a_workload_that_does_not_fit_still_has_a_plan(planned: Planned) -> None:
    plan = planned("model=gemma-3-27b", "devices=rtx4090")
    assert not plan.fits
    assert (plan.num_pages, plan.max_sequences) == (0, 0)
    assert json.loads(json.dumps(plan.to_dict()))["shortfall"]["missing"] > 0


def test_a_budget_short_of_the_workload_gives_the_pages_that_it_holds(planned: Planned) -> None:
    plan = planned("model=llama-3.1-8b", "devices=rtx4090", "workload=rag")
    params, words = plan.resolution.params, (plan.max_batch_size, plan.max_seq_len)
    assert not plan.fits
    assert params.memory(plan.num_pages, *words).total <= plan.capacity.budget
    assert params.memory(plan.num_pages + 1, *words).total > plan.capacity.budget


def test_dictionary_is_json_and_tells_what_was_asked_and_what_came_of_it(planned: Planned) -> None:
    values = json.loads(json.dumps(planned(*LLAMA).to_dict()))
    assert values["requested"]["cache"]["kv_cache_format"] is None
    assert values["resolved"]["cache"]["kv_cache_format"] == "bfloat16"
    assert (
        values["resolved"]["workload"] | {"max_batch_size": 35, "max_seq_len": 131072} == values["resolved"]["workload"]
    )
    assert [choice["key"] for choice in values["choices"]][-1] == "workload.max_batch_size"


def test_layer_groups_say_what_each_kind_holds(planned: Planned) -> None:
    full, windowed = planned("model=gpt-oss-120b", "devices=h200", "workload=chat").layer_groups()
    assert (full["kind"], full["num_layers"], full["window"]) == ("full", 18, None)
    assert (windowed["kind"], windowed["window"]) == ("sliding_window", 128)
    assert (full["num_pages"], windowed["num_pages"]) == (64 * 64, 64 * 2)
