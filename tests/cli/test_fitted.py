"""`kvcfg fit quantization=auto` as a user meets it: what is printed, and what is refused before a model runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcfg.cli import main
from kvcfg.composition import compose
from kvcfg.planning.layer_formats import FOUND_FORMATS as FORMATS

transformers = pytest.importorskip("transformers")

NUM_LAYERS = 2


@pytest.fixture
def command(save_model: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What finds formats for a small model on a small text."""
    monkeypatch.setenv("KVCFG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "small", NUM_LAYERS)
    text = [f"workload.text={text_file.name}", "workload.first_token=16", "workload.window_tokens=96"]
    pages = ["cache.kv_cache_page_size=32", "quantization=auto"]
    return ["fit", "model=hf", f"model.path={model}", "devices=cpu", *text, *pages]


def test_json_stands_alone_and_its_recipe_composes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "gate.max_kl=1", "output=json"]) == 0
    data = json.loads(capsys.readouterr().out)
    formats = {(item["layer"], item["side"]): item["format"] for item in data["formats"]}
    words = [word for word in command[1:] if word != "quantization=auto"]
    stored = compose([*words, *data["recipe"]])
    assert len(formats) == 2 * NUM_LAYERS
    assert data["kl"] <= 1 and data["kl_predicted"] <= 1
    for item in stored.quantization.layers or ():
        for layer in item.layers or ():
            assert (item.key_format, item.value_format) == (formats[layer, "key"], formats[layer, "value"])


def test_table_holds_the_overrides_as_a_shell_takes_them(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "gate.max_kl=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "In the place of quantization=auto" in lines
    assert any("'quantization.layers=[{layers:[" in line for line in lines)


def test_formats_that_lose_too_much_on_other_text_fail(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvcfg.evaluation.allocation.squared_errors", lambda start: dict.fromkeys(FORMATS, 1e-6))
    assert main([*command, "gate.max_kl=0.01"]) == 1
    told = capsys.readouterr()
    assert "above the gate 0.01, on other text than the formats were found on. Try: gate.max_kl=" in told.err
    assert "quantization=bits4" in told.out


@pytest.mark.parametrize("verb", ["plan", "eval", "bench", "calibrate"])
def test_other_verbs_say_what_to_run_first(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "quantization=auto", "devices=cpu"]) == 2
    assert "first run kvcfg fit quantization=auto gate.max_kl=0.005" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quantization=auto"], "Try: gate.max_kl=0.005"),
        (["quantization=auto", "quantization.key_format=int8"], "Try: quantization.key_format=auto"),
        (["quantization=auto", "cache=int8"], "Try: cache.kv_cache_format=null"),
        (["cache.kv_cache_format=auto"], "cache.kv_cache_format=auto: must be one of"),
        (["quantization=auto", "quantization.layers=[{layers:[0],format:int8}]"], "Try: quantization.layers=null"),
        (["quantization=auto,bits4", "-m"], "quantization=auto: cannot be one choice of several"),
        (["gate.max_kl=0.1"], "gate.max_kl=0.1: is for quantization=auto"),
    ],
)
def test_what_cannot_be_found_is_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "devices=cpu", *words]) == 2
    assert told in capsys.readouterr().err


def test_fit_without_formats_to_find_needs_no_torch() -> None:
    code = """
import sys
from kvcfg.cli import main
status = main(["fit", "model=llama-3.1-8b", "devices=h100"])
print([name for name in ("torch", "transformers", "rich") if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
