from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError, Problem
from kvcfg.planning import Plan, fit, plan, plan_table

Planned = Callable[..., Plan]
MODELS = (
    "llama-3.1-8b", "gemma-3-27b", "gpt-oss-120b", "deepseek-v3", "qwen3-next-80b-a3b", "llama-4-scout",
    "mistral-7b-v0.1", "smollm2-135m",
)  # fmt: skip
DEVICES = ("rtx4090", "h100", "mi300xx8_dp2tp4", "cpu")


@pytest.mark.parametrize("model", MODELS)
def test_no_line_is_wider_than_a_hundred_columns(composed: Callable[..., ExperimentConfig], model: str) -> None:
    for device, cache in itertools.product(DEVICES, ("default", "int8")):
        heads = ("devices.count=1",) if model == "smollm2-135m" else ()
        dp = ("devices.data_parallel_degree=1",) if heads else ()
        experiment = composed(f"model={model}", f"devices={device}", f"cache={cache}", *heads, *dp)
        for text in (plan(experiment).table(), fit(experiment).table()):
            assert [line for line in text.splitlines() if len(line) > 100] == []


def test_first_sentence_says_how_much_fits(planned: Planned) -> None:
    text = planned("model=llama-3.1-8b", "devices=h100x8", "cache.kv_cache_page_size=64").table()
    assert text.startswith(
        "llama-3.1-8b on 8 × h100: 4,595,904 tokens fit, enough for 35 sequences of 131,072 tokens. A token\n"
        "takes 128 KiB, a page of 64 tokens 8 MiB.\n"
    )


def test_first_sentence_says_what_takes_too_much(planned: Planned) -> None:
    text = planned("model=gemma-3-27b", "devices=rtx4090").table()
    assert text.startswith("gemma-3-27b on rtx4090 does not fit: weights take 51.1 GiB of a device")
    assert "= missing             40 GiB" in text


def test_every_choice_is_printed_with_its_reason(planned: Planned) -> None:
    result = planned("model=deepseek-v3", "devices=h200x8", "cache=fp8", "speculative=mtp")
    text = " ".join(result.table().split())
    assert len(result.choices) >= 5
    for choice in result.choices:
        assert choice.why in text


def test_printed_parts_of_the_memory_are_all_of_it(planned: Planned) -> None:
    lines = planned("model=qwen3-next-80b-a3b", "devices=h100x8_dp2tp4", "devices.reserved_gib=4").table().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("memory"))
    names = [line.split("  ")[1].strip() for line in lines[start + 1 : start + 12] if line.startswith("  ")]
    assert [name for name in names if name] == ["device", "− held back", "− weights", "− reserved", "− cache", "= free"]


def test_sweep_table_has_a_row_a_point_and_a_column_for_what_differs(planned: Planned) -> None:
    words = [("model=llama-3.1-8b", f"devices={name}", "workload=rag") for name in ("rtx4090", "h100x8")]
    head, small, large, *_ = plan_table([(point, planned(*point)) for point in words]).splitlines()
    assert head.split()[0] == "devices"
    assert small.startswith("rtx4090")
    assert small.endswith("no: 57.4 GiB missing")
    assert large.split()[0] == "h100x8"
    assert large.endswith("yes")


def test_sweep_table_tells_why_a_point_was_refused(planned: Planned) -> None:
    good = ("model=llama-3.1-8b", "devices=h100")
    error = ConfigError(Problem("devices.count", "must divide the heads", 3, "devices.count=1"))
    text = plan_table([(good, planned(*good)), (("model=llama-3.1-8b", "devices.count=3"), error)])
    assert "refused: devices.count=3: must divide the heads. Try: devices.count=1" in text
