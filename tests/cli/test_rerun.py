"""`kvcfg rerun`: a row of a small random model, measured and measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcfg.cli import main
from kvcfg.results.store import ResultStore
from tests.cli.conftest import SaveModel


@pytest.fixture
def measured(save_model: SaveModel, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultStore:
    """A folder with one row in its results."""
    from kvcfg.composition import compose
    from kvcfg.evaluation.measure import evaluate

    monkeypatch.chdir(tmp_path)
    overrides = [
        "model=hf", f"model.path={save_model(tmp_path / 'model', 2)}", "devices=cpu", "cache.kv_cache_format=int8",
        "cache.kv_cache_page_size=16", f"workload.text={text_file}", "workload.first_token=0", "workload.num_windows=1",
        "workload.window_tokens=64", "workload.decode_tokens=2",
    ]  # fmt: skip
    store = ResultStore("results/rows.jsonl")
    store.append(evaluate(compose(overrides), overrides=overrides))
    return store


def test_figures_of_a_row_repeat(measured: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    [fingerprint] = measured.rows()
    assert main(["rerun", fingerprint[:10]]) == 0
    assert "Every figure repeats." in capsys.readouterr().out
    assert len(measured.path.read_text().splitlines()) == 1


def test_figures_that_changed_are_told_with_exit_code_1(
    measured: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    [row] = measured.rows().values()
    data = json.loads(row.to_json()) | {"kl": row.kl + 1e-3}
    measured.path.write_text(json.dumps(data) + "\n")
    assert main(["rerun", row.fingerprint[:10], "output=json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [figure["name"] for figure in found["figures"] if figure["repeats"] is False] == ["kl"]


def test_unknown_fingerprint_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rerun", "abcdef"]) == 2
    assert "kvcfg eval adds some" in capsys.readouterr().err
