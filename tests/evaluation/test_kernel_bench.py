"""Kernels are timed once they are known to be right, and a row says on what, with what, and beside whom."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import kvcfg
from kvcfg.errors import CapacityError, ConfigError, KvcfgError
from kvcfg.evaluation import kernel_bench
from kvcfg.evaluation.kernel_bench import measure_kernels
from kvcfg.evaluation.kernel_rows import KernelRow
from kvcfg.evaluation.turns import Turn
from kvcfg.kernels.cpu.loader import load_kernel

pytestmark = pytest.mark.usefixtures("small_memory")


def measured(*overrides: str) -> list[KernelRow]:
    experiment = kvcfg.compose(["model=tiny", "devices=cpu", *overrides])
    return measure_kernels(experiment, batch_size=2, context=100, rounds=2)


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    monkeypatch.setattr(kernel_bench, "vllm_calls", lambda *arguments: [])


def test_every_kernel_has_a_row() -> None:
    assert [row.kernel for row in measured()] == ["decode", "prefill", "append", "append"]


def test_recipe_that_closes_pages_has_a_row_for_that() -> None:
    assert [row.kernel for row in measured("quantization=bits4")].count("close") == 1


def test_figures_of_a_row_belong_together() -> None:
    for row in measured():
        assert row.gb_per_s == pytest.approx(row.nbytes / row.ms / 1e6)
        assert row.share == pytest.approx(row.gb_per_s / row.read_gb_per_s)
        assert row.torch_ratio is None or row.torch_ratio == pytest.approx(row.torch_ms / row.ms)


def test_row_says_what_it_was_measured_with() -> None:
    row = measured("cache.kv_cache_format=int8", "cache.kv_cache_page_size=16")[0]
    assert (row.model, row.shape, row.format, row.page_size) == ("tiny", "4/2/16", "int8", 16)
    assert (row.batch_size, row.new_tokens, row.context, row.threads) == (2, 1, 100, torch.get_num_threads())
    assert set(row.versions) >= {"python", "kvcfg", "torch"} and row.cpu


def test_rows_are_plain_json() -> None:
    row = measured()[0]
    assert json.loads(json.dumps(row.to_dict()))["kernel"] == "decode"


def test_context_is_no_longer_than_the_models_and_a_windows() -> None:
    experiment = kvcfg.compose(["model=gemma-3-1b", "devices=cpu"])
    rows = measure_kernels(experiment, batch_size=1, context=600, rounds=1)
    assert {(row.shape, row.context) for row in rows if row.kernel == "decode"} == {
        ("4/1/256", 600),
        ("4/1/256 window 512", 512),
    }
    assert measured_context(model_context=512) == 512


def measured_context(model_context: int) -> int | None:
    experiment = kvcfg.compose(["model=tiny", f"model.max_seq_len={model_context}", "devices=cpu"])
    return measure_kernels(experiment, batch_size=1, context=100_000, rounds=1)[0].context


@pytest.mark.skipif(load_kernel("pages") is None, reason="kernels cannot be compiled here")
@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_kernel_that_is_off_is_told_and_nothing_is_timed(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = kernel_bench.kernel_cases
    wrong = (lambda pages: (dataclasses.replace(case, error=error) for case in honest(pages)),)
    monkeypatch.setattr(kernel_bench, "kernel_cases", wrong[0])
    monkeypatch.setattr(kernel_bench, "take_turns", lambda *arguments: pytest.fail("something was timed"))
    with pytest.raises(KvcfgError, match=r"decode of bfloat16.* heads 4/2/16 is (5.0e-01|nan) away .* KVCFG_CPU"):
        measured()


def test_vllm_counts_with_its_faster_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "vllm_calls", lambda *arguments: [lambda: None, lambda: None])
    monkeypatch.setattr(kernel_bench, "take_turns", lambda turns, *others: _numbered(turns))
    row = measured()[0]
    # In order: the reader of memory, then the first case by the kernel if there is one, by torch, by vLLM twice.
    assert row.vllm_ms == pytest.approx(1e3 * (4 if row.compiled else 3))
    assert row.vllm_ratio == pytest.approx(row.vllm_ms / row.ms)


def _numbered(turns: list[Turn]) -> None:
    for number, turn in enumerate(turns, start=1):
        turn.times.append(number)


def test_config_for_gpus_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"devices=h100.*Try: devices=cpu"):
        measure_kernels(kvcfg.compose(["model=tiny", "devices=h100"]))


def test_more_pages_than_memory_are_refused_before_they_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "available_memory", lambda: 1 << 20)
    with pytest.raises(CapacityError, match=r"heads 4/2/16.* are free. Try: batch_size=1 context=25"):
        measured()


def test_batch_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "available_memory", lambda: 8 << 20)
    experiment = kvcfg.compose(["model=tiny", "devices=cpu"])
    with pytest.raises(CapacityError) as refused:
        measure_kernels(experiment, batch_size=10_000, context=100)
    fitting = int(str(refused.value).rpartition("batch_size=")[2])
    assert 1 < fitting < 10_000 and measure_kernels(experiment, batch_size=fitting, context=100, rounds=1)


def test_formats_that_are_still_to_be_found_are_refused() -> None:
    with pytest.raises(ConfigError, match="kvcfg fit"):
        measured("quantization=auto")
