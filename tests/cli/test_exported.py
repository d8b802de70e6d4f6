"""`kvcfg export` as a user meets it: files whole or not at all, errors that mend, JSON alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kvcfg.cli import main

LLAMA = ["model=llama-3.1-8b", "devices=h100"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_file_is_written_and_the_command_names_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "engine=vllm", *LLAMA, "out=new/vllm.yaml"]) == 0
    assert yaml.safe_load((folder / "new" / "vllm.yaml").read_text())["block-size"] == 128
    assert "vllm serve --config new/vllm.yaml" in capsys.readouterr().out


def test_refused_export_leaves_an_older_file_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "max.yaml").write_text("old")
    assert main(["export", "engine=max", *LLAMA, "cache=int8", "out=max.yaml"]) == 2
    assert (folder / "max.yaml").read_text() == "old" and list(folder.iterdir()) == [folder / "max.yaml"]
    assert "Try: cache.kv_cache_format=float8_e4m3fn" in capsys.readouterr().err


def test_place_that_cannot_be_written_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    assert main(["export", "engine=vllm", *LLAMA, "out=file/vllm.yaml"]) == 2
    assert "out=file/vllm.yaml: cannot be written" in capsys.readouterr().err


def test_json_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "engine=sglang", *LLAMA, "output=json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"]["page-size"] == 128 and data["conversions"] and data["losses"] == []


def test_no_engine_is_a_table_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *LLAMA]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("engine") and "lmcache 0.5.6: refused" in shown


def test_all_engines_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *LLAMA, "output=json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert [item["engine"] for item in engines].count("max") == 2 and any("error" in item for item in engines)


@pytest.mark.parametrize("option", ["out=all.yaml", "version=26.4", "scales=folder"])
def test_options_of_one_engine_are_refused_for_all(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *LLAMA, option]) == 2
    assert "engine=vllm" in capsys.readouterr().err


def test_unknown_engine_and_version_are_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "engine=vlm", *LLAMA]) == 2
    assert main(["export", "engine=max", "version=26.5", *LLAMA]) == 2
    errors = capsys.readouterr().err
    assert "engine=vllm" in errors and "version=26.4" in errors


def test_sweep_writes_no_file_over_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["export", "engine=vllm", *LLAMA, "cache.kv_cache_page_size=16,32", "-m"]
    assert main([*sweep, "out=vllm.yaml"]) == 2
    assert not list(folder.iterdir())
    capsys.readouterr()
    assert main([*sweep, "output=json"]) == 0
    assert [row["settings"]["block-size"] for row in json.loads(capsys.readouterr().out)] == [16, 32]


def test_sweep_with_a_point_that_cannot_be_exported_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "engine=sglang", *LLAMA, "cache.kv_cache_format=bfloat16,int8", "-m"]) == 2
    assert capsys.readouterr().out == ""


def test_scales_are_refused_for_a_recipe_without_any(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "engine=vllm", *LLAMA, "scales=here", "out=vllm.yaml"]) == 2
    assert "quantization.scale_source=static" in capsys.readouterr().err and not list(folder.iterdir())
