"""`kvcfg diff` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcfg.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_two_choices_are_compared_under_the_same_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "cache=fp8", "cache.kv_cache_format=bfloat16", "model=llama-3.1-8b", "devices=h100"]) == 0
    shown = capsys.readouterr().out
    assert "cache.kv_cache_format" in shown and "kvcfg export engine=vllm" in shown and "bytes_per_token" in shown


def test_json_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama-3.1-8b devices=h100", "vllm serve meta-llama/Llama-3.1-8B-Instruct", "output=json"]
    assert main(["diff", *words]) == 0
    assert json.loads(capsys.readouterr().out)["b"] == {"label": words[1], "row": None}


def test_side_that_cannot_be_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "cache=fp9", "cache=int8"]) == 2
    assert "cache=fp8" in capsys.readouterr().err


def test_fingerprint_without_results_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "abcdef12", "cache=int8"]) == 2
    assert "kvcfg eval adds some" in capsys.readouterr().err
