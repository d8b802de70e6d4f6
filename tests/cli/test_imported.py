"""`kvcfg import` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcfg.cli import main
from kvcfg.composition import compose

LINE = "vllm serve meta-llama/Llama-3.1-8B-Instruct -tp 2 --kv-cache-dtype fp8 --port 8000"


def test_command_to_paste_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", LINE, "devices=h100x8"]) == 0
    shown = capsys.readouterr().out
    assert "kvcfg plan model=llama-3.1-8b" in shown and "port=8000" in shown


def test_json_holds_overrides_that_compose_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", LINE, "devices=h100x8", "output=json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert compose(data["overrides"]).model_dump(mode="json") == data["config"]


def test_preset_that_is_written_composes_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment" / "mine.yaml"
    assert main(["import", LINE, "devices=h100x8", f"out={path}", "output=json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert compose(["experiment=mine"], config_dir=tmp_path).model_dump(mode="json") == config


def test_what_is_no_source_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "nothing.yaml")]) == 2
    assert "is no file, nor a command line" in capsys.readouterr().err
