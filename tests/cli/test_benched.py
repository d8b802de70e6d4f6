"""`kvcfg bench`: which of the two tables is shown, what it says of the other, and what JSON holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcfg.cli import main

pytest.importorskip("torch")

SMALL = ["bench", "model=tiny", "devices=cpu", "batch_size=1", "context=64", "cache.kv_cache_page_size=16"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are taken to be small, and figures to need one round."""
    for module in ("kernel_bench", "kernel_pages", "memory_reader"):
        monkeypatch.setattr(f"kvcfg.evaluation.{module}.cold_bytes", lambda: 1 << 20)
    monkeypatch.setattr("kvcfg.evaluation.kernel_bench.vllm_calls", lambda *arguments: [])


def test_model_without_weights_has_its_kernels_and_a_line_on_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("kernel") and "decode" in shown.out and "DynamicCache" not in shown.out
    assert "decode steps of tiny were not timed" in shown.err and "Try: model=hf model.path=" in shown.err


def test_model_that_is_not_fetched_is_told_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCFG_HOME", str(tmp_path))
    assert main(["bench", *SMALL[2:]]) == 0
    assert "its weights are not on this machine. Try: measure=model, which fetches them" in capsys.readouterr().err


def test_kernels_alone_say_nothing_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "measure=kernels"]) == 0
    assert "not timed" not in capsys.readouterr().err


def test_sweep_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "cache.kv_cache_format=bfloat16,int8", "-m"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("× torch: ") == 1 and shown.out.count("decode") == 2
    assert shown.err.count("were not timed") == 1


def test_json_holds_overrides_and_rows_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "output=json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"overrides", "kernels", "model"} and data["model"] is None
    assert [row["kernel"] for row in data["kernels"]] == ["decode", "prefill", "append", "append"]
    assert data["kernels"][0]["versions"]["torch"] and data["kernels"][0]["context"] == 64


def test_sweep_in_json_is_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "batch_size=1,2", "-m", "output=json", "measure=kernels"]) == 0
    assert [row["kernels"][0]["batch_size"] for row in json.loads(capsys.readouterr().out)] == [1, 2]


def test_point_that_cannot_be_timed_is_told_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcfg.evaluation.kernel_bench.available_memory", lambda: 8 << 20)
    assert main([*SMALL, "batch_size=1,4000", "-m", "measure=kernels"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("decode") == 1 and "batch_size=4000" in shown.err and "are free" in shown.err


def test_config_for_gpus_without_weights_says_why_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model=tiny", "devices=h100"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "Try: devices=cpu" in shown.err and "no weights to run" in shown.err


def test_measure_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "measure=kernel"]) == 2
    assert "measure=kernels" in capsys.readouterr().err


def test_job_of_hydra_prints_its_own_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "measure=kernels", "-c", "job"]) == 0
    assert "measure: kernels" in capsys.readouterr().out


@pytest.fixture
def own_model(tmp_path: Path, save_model: Callable[[Path, int], Path], text_file: Path) -> list[str]:
    """Overrides that name a random model, and a text that its tokenizer knows."""
    folder = save_model(tmp_path / "random", 2)
    text = [f"workload.text={text_file}", "workload.first_token=0"]
    few = ["workload.window_tokens=64", "workload.decode_tokens=2"]
    return ["bench", "model=hf", f"model.path={folder}", "devices=cpu", *SMALL[3:], *text, *few]


def test_model_that_is_here_has_both_tables(own_model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(own_model) == 0
    kernels, _, steps = capsys.readouterr().out.partition("\n\nmodel ")
    assert kernels.startswith("kernel") and "DynamicCache" in steps


def test_model_alone_has_its_table_alone(own_model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*own_model, "measure=model"]) == 0
    assert capsys.readouterr().out.startswith("model ")


def test_json_of_a_model_that_is_here_holds_both(own_model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*own_model, "output=json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert data["kernels"] and data["model"]["context"] == 64


def test_model_that_does_not_fit_in_memory_is_not_loaded_unasked(
    own_model: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcfg.cli.benched.available_memory", lambda: 1000)
    assert main(own_model) == 0
    assert "as float32, more than is free. Try: measure=model" in capsys.readouterr().err
