from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcfg.planning import Plan

Planned = Callable[..., Plan]
WORK = ("workload.max_batch_size=4", "workload.max_seq_len=8192")


def test_a_step_reads_weights_once_and_the_cache_of_every_sequence(planned: Planned) -> None:
    plan = planned("model=llama-3.1-8b", "devices=h100", *WORK)
    moved = plan.experiment.model.weight_bytes + 4 * 8192 * 131072
    assert plan.roofline.min_step_ms == pytest.approx(moved / 3350e9 * 1e3)
    assert plan.roofline.max_tokens_per_s == pytest.approx(4 * 3350e9 / moved)


def test_tensor_parallel_devices_read_their_shares(planned: Planned) -> None:
    one, eight = (planned("model=llama-3.1-8b", f"devices={name}", *WORK).roofline for name in ("h100", "h100x8"))
    assert (eight.weight_bytes * 8, eight.kv_bytes * 8) == (one.weight_bytes, one.kv_bytes)


def test_replicas_add_tokens_and_no_speed_of_a_step(planned: Planned) -> None:
    one, eight = (planned("model=llama-3.1-8b", f"devices={name}", *WORK).roofline for name in ("h100", "h100x8_dp8"))
    assert eight.min_step_ms == one.min_step_ms
    assert eight.max_tokens_per_s == pytest.approx(8 * (one.max_tokens_per_s or 0))


def test_every_device_reads_the_whole_latent(planned: Planned) -> None:
    plan = planned("model=deepseek-v3", "devices=h200x8", *WORK)
    assert plan.roofline.kv_bytes == 4 * 8192 * 70272


def test_windowed_layers_read_their_window(planned: Planned) -> None:
    plan = planned("model=gpt-oss-120b", "devices=h100", *WORK)
    per_token = 18 * 2 * 8 * 64 * 2
    assert plan.roofline.kv_bytes == 4 * (8192 + 128) * per_token


@pytest.mark.parametrize(("seq_len", "in_chunk"), [(8191, 8191), (8192, 8192), (8193, 1), (20000, 3616)])
def test_chunked_layers_read_the_running_chunk(planned: Planned, seq_len: int, in_chunk: int) -> None:
    words = ("workload.max_batch_size=1", f"workload.max_seq_len={seq_len}")
    plan = planned("model=llama-4-scout", "devices=mi300xx8", "devices.count=1", "devices.memory_gib=400", *words)
    assert plan.roofline.kv_bytes == (12 * seq_len + 36 * in_chunk) * 2 * 8 * 128 * 2


def test_linear_states_are_read_and_written(planned: Planned) -> None:
    plan = planned("model=qwen3-next-80b-a3b", "devices=mi300x", *WORK)
    assert plan.roofline.kv_bytes == 4 * 8192 * plan.bytes_per_token + 2 * plan.breakdown()["linear_states"]


def test_experts_that_sleep_are_not_read(planned: Planned) -> None:
    plan = planned("model=mixtral-8x7b", "devices=h200", *WORK)
    assert plan.roofline.weight_bytes == plan.experiment.model.active_weight_bytes < plan.experiment.model.weight_bytes


def test_scales_are_read_with_the_elements(planned: Planned) -> None:
    plan = planned("model=llama-3.1-8b", "devices=h100", "cache.kv_cache_format=int8", *WORK)
    assert plan.roofline.kv_bytes == 4 * 8192 * 67584


def test_drafts_raise_the_bound_by_what_one_step_can_gain(planned: Planned) -> None:
    words = ("model=llama-3.1-8b", "devices=h100", *WORK)
    plain, drafting = planned(*words).roofline, planned(*words, "speculative=eagle").roofline
    slower = (plain.min_step_ms or 0) / (drafting.min_step_ms or 1)
    assert drafting.max_tokens_per_s == pytest.approx(3 * (plain.max_tokens_per_s or 0) * slower)


@pytest.mark.parametrize(("words", "reads"), [("speculative=eagle", 2 * 1), ("speculative=dflash", 1 * 5)])
def test_layers_of_a_drafter_are_read_at_each_of_its_steps(planned: Planned, words: str, reads: int) -> None:
    plain, drafting = (planned("model=llama-3.1-8b", "devices=h100", *WORK, *more) for more in ((), (words,)))
    assert 32 * (drafting.roofline.kv_bytes - plain.roofline.kv_bytes) == reads * plain.roofline.kv_bytes


def test_no_bound_without_a_bandwidth(planned: Planned) -> None:
    bound = planned("model=llama-3.1-8b", "devices=h100", "devices.bandwidth_gb_s=null").roofline
    assert bound.min_step_ms is None
    assert bound.max_tokens_per_s is None
