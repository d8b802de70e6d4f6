"""`kvcfg calibrate` on a small random model with a tokenizer of its own: the file, what is printed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcfg.cli import main
from kvcfg.integrations.calibration import load_calibration

transformers = pytest.importorskip("transformers")


@pytest.fixture
def command(save_model: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What calibrates the small model on a small text."""
    monkeypatch.setenv("KVCFG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "small", 5)
    text = [f"workload.text={text_file.name}", "workload.first_token=16", "workload.window_tokens=128"]
    return ["calibrate", "model=hf", f"model.path={model}", "devices=cpu", *text]


def file_of(folder: Path) -> Path:
    return folder / "home" / "calibrations" / "small.safetensors"


def test_file_is_written_and_told(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(file_of(tmp_path))
    assert lines[1] == "small, 256 tokens from token 16, pages of 128, RoPE pairs as the model has them"
    assert [line.split()[0] for line in lines[5:8]] == ["0-1", "2-3", "4"]
    assert load_calibration(file_of(tmp_path)).provenance.num_tokens == 256


def test_json_stands_alone(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "output=json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["path"], data["model"], data["num_tokens"]) == (str(file_of(tmp_path)), "small", 256)
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2, 3, 4]
    assert all(gain >= 0 for layer in data["layers"] for gain in layer["key_gain"])


def test_table_and_json_say_the_same(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    row = capsys.readouterr().out.splitlines()[7].split()
    assert main([*command, "output=json"]) == 0
    last = json.loads(capsys.readouterr().out)["layers"][4]
    assert row[1] == f"{sum(last['key_gain']) / 2:.2f}"
    assert row[6:] == [f"{max(last['key_amax']):.4g}", f"{max(last['value_amax']):.4g}"]


def test_file_goes_where_the_recipe_looks_for_it(command: list[str], tmp_path: Path) -> None:
    asked = ["quantization=bits4_calibrated", f"quantization.calibration={tmp_path}/own.st"]
    assert main([*command, *asked]) == 0
    assert load_calibration(tmp_path / "own.st").provenance.balance_rope is True
    assert not file_of(tmp_path).exists()


def test_sweep_that_would_write_one_file_twice_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "cache.kv_cache_page_size=32,64", "-m"]) == 2
    assert "would be written by 2 points of the sweep" in capsys.readouterr().err
    assert not file_of(tmp_path).exists()


def test_sweep_over_models_writes_a_file_for_each(
    save_model: Any, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", 5)
    models = f"model.path={tmp_path / 'small'},{other}"
    sweep = [word for word in command if not word.startswith("model.path")]
    assert main([*sweep, models, "output=json", "-m"]) == 0
    assert [row["model"] for row in json.loads(capsys.readouterr().out)] == ["small", "other"]
    assert sorted(path.stem for path in file_of(tmp_path).parent.iterdir()) == ["other", "small"]


def test_text_that_is_too_short_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "workload.num_windows=9"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "workload.first_token=16: the text has 400 tokens" in told.err
    assert not file_of(tmp_path).exists()


def test_hydra_application_does_the_same(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvcfg.cli.arguments import read_arguments
    from kvcfg.cli.hydra_app import run_app

    assert run_app(read_arguments(command)) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(file_of(tmp_path))


def test_model_without_weights_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: Any = main(["calibrate", "model=tiny", "devices=cpu", "workload.window_tokens=64"]), capsys.readouterr()
    assert told[0] == 2 and "no weights to run" in told[1].err
