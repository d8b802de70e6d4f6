"""`kvcfg eval` without a model: what is skipped, what is shown, and what the gate refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcfg.cli import main, measured
from kvcfg.composition import grid
from kvcfg.evaluation.fingerprint import fingerprint
from kvcfg.evaluation.retrieval.request import RetrievalRequest
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore
from kvcfg.results.stored_error import StoredError
from kvcfg.results.task_score import TaskScore

FORMATS = ["cache.kv_cache_format=bfloat16,int8"]
KL = {"bfloat16": 1e-5, "int8": 0.02}


def rows(kl: dict[str, float] = KL) -> list[ResultRow]:
    """One row for each format, as if it had been measured."""
    made = []
    for point in grid(FORMATS):
        assert point.experiment is not None
        name = str(point.experiment.cache.kv_cache_format)
        made.append(row(name, kl[name], fingerprint(point.experiment), point.overrides))
    return made


def row(name: str, kl: float, identity: str, overrides: tuple[str, ...]) -> ResultRow:
    known: dict[str, Any] = {field: 1.0 for field in ResultRow.__dataclass_fields__}
    known |= {field: "x" for field in ("model", "device", "recipe", "text_sha", "created")}
    known |= {"kl": kl, "kl_ci": (kl * 0.9, kl * 1.1), "format": name, "fingerprint": identity, "page_size": 128}
    known |= {"tasks": None, "kl_by_depth": None, "stored_error": None}
    known |= {"overrides": overrides, "config": {}, "versions": {}, "num_predictions": 63, "experimental": False}
    return ResultRow(**known)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where Hydra must not be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvcfg.cli.hydra_app.run_app", lambda arguments: pytest.fail("something was measured"))
    return tmp_path


@pytest.fixture
def finished(folder: Path) -> Path:
    """The same with a row for every format."""
    for made in rows():
        ResultStore("results/rows.jsonl").append(made)
    return folder


def test_finished_points_are_shown_without_measuring(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *FORMATS, "-m"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("bfloat16") < shown.index("int8")


def test_sweep_prints_a_json_list_in_the_order_of_the_grid(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "cache.kv_cache_format=int8,bfloat16", "-m", "output=json"]) == 0
    assert [item["format"] for item in json.loads(capsys.readouterr().out)] == ["int8", "bfloat16"]


def test_single_run_prints_one_json_object(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "cache.kv_cache_format=int8", "output=json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "int8"


def test_gate_refuses_a_row_in_one_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *FORMATS, "-m", "gate.max_kl=0.001"]) == 1
    assert capsys.readouterr().err.splitlines() == ["kvcfg: int8 on x: KL 0.02 [0.018, 0.022] is above the gate 0.001"]


def test_gate_lets_good_rows_pass(finished: Path) -> None:
    assert main(["eval", *FORMATS, "-m", "gate.max_kl=0.1"]) == 0


@pytest.mark.parametrize(("kl", "code"), [(0.02, 0), (0.019, 0), (0.01, 1)])
def test_row_must_lie_within_the_interval_of_the_baseline(
    finished: Path, capsys: pytest.CaptureFixture[str], kl: float, code: int
) -> None:
    (finished / "before.json").write_text(rows({"bfloat16": 0.0, "int8": kl})[1].to_json())
    assert main(["eval", "cache.kv_cache_format=int8", "gate.baseline=before.json"]) == code
    assert ("above the baseline's 0.01" in capsys.readouterr().err) == bool(code)


def test_baseline_of_another_text_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = json.loads(rows()[1].to_json()) | {"text_sha": "another"}
    (finished / "before.json").write_text(json.dumps(other))
    assert main(["eval", "cache.kv_cache_format=int8", "gate.baseline=before.json"]) == 1
    assert "text_sha another" in capsys.readouterr().err


def test_baseline_that_is_not_there_is_told_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "gate.baseline=nowhere.json"]) == 2
    assert "gate.baseline=nowhere.json: must be the JSON of an earlier row" in capsys.readouterr().err


def test_point_without_a_row_makes_the_run_fail(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvcfg.cli.hydra_app.run_app", lambda arguments: 0)
    assert main(["eval", "cache.kv_cache_format=int8,float16", "-m"]) == 1
    told = capsys.readouterr()
    assert "int8" in told.out
    assert "1 of 2 points could not be measured" in told.err


@pytest.mark.parametrize(("force", "expected"), [("false", []), ("true", [()])])
def test_job_measures_again_only_when_forced(
    finished: Path, monkeypatch: pytest.MonkeyPatch, force: str, expected: list[tuple[str, ...]]
) -> None:
    measured_with: list[Any] = []

    def evaluate(experiment: Any, *, overrides: list[str], retrieval: Any, by_head: bool) -> ResultRow:
        measured_with.append(tuple(item for item in overrides if "force" in item))
        return rows()[1]

    monkeypatch.setattr("kvcfg.evaluation.measure.evaluate", evaluate)
    points = grid(["cache.kv_cache_format=int8", f"force={force}"], config_name="eval")
    measured.evaluate_one(None, points)  # type: ignore[arg-type]
    assert measured_with == expected


NEEDLE = TaskScore(right=0.75, right_reference=1.0, num_prompts=8, prompt_tokens=1024)
"""A score as it is asked for unless told otherwise."""


def ask_again(monkeypatch: pytest.MonkeyPatch, *given: str) -> list[RetrievalRequest]:
    """What is asked of int8, whose row in the store has a score of the needle."""
    asked: list[RetrievalRequest] = []

    def evaluate(experiment: Any, *, overrides: list[str], retrieval: RetrievalRequest, by_head: bool) -> ResultRow:
        asked.append(retrieval)
        return rows()[1]

    ResultStore("results/rows.jsonl").append(replace(rows()[1], tasks={"needle": NEEDLE}))
    monkeypatch.setattr("kvcfg.evaluation.measure.evaluate", evaluate)
    points = grid(["cache.kv_cache_format=int8", *given], config_name="eval")
    measured.evaluate_one(None, points)  # type: ignore[arg-type]
    return asked


@pytest.mark.parametrize("given", [["tasks=[needle]"], ["tasks=[]"], []])
def test_job_asks_nothing_where_the_row_has_the_tasks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    assert ask_again(monkeypatch, *given) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["tasks=[variables]"], RetrievalRequest(("variables",), 1024, 8)),
        (["tasks=[needle]", "task_tokens=512"], RetrievalRequest(("needle",), 512, 8)),
        (["tasks=[needle]", "task_prompts=4"], RetrievalRequest(("needle",), 1024, 4)),
    ],
)
def test_job_asks_what_the_row_lacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], expected: RetrievalRequest
) -> None:
    assert ask_again(monkeypatch, *given) == [expected]


def test_tasks_are_shown_where_they_were_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ResultStore("results/rows.jsonl").append(replace(rows()[1], tasks={"needle": NEEDLE}))
    for given, shown in (([], False), (["tasks=[needle]"], True)):
        assert main(["eval", "cache.kv_cache_format=int8", *given]) == 0
        assert ("75% / 100%" in capsys.readouterr().out) == shown


def test_points_of_a_sweep_that_ask_other_tasks_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "tasks=[needle]", "task_tokens=1024,2048", "-m"]) == 2
    assert "task_tokens: must be the same at all points of a sweep" in capsys.readouterr().err


def test_task_that_there_is_not_is_refused_with_those_that_there_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "tasks=[needles]"]) == 2
    told = capsys.readouterr().err
    assert "must be one of needle, multi_key, multi_value, variables or frequent_words" in told
    assert "tasks=[needle]" in told


ERROR = StoredError(keys=[[0.01, 0.02], [0.03, 0.04]], values=[[0.05, 0.06], [0.07, 0.08]])
"""Two layers of two heads."""


def test_plot_is_drawn_from_finished_rows(folder: Path) -> None:
    for made in rows():
        ResultStore("results/rows.jsonl").append(replace(made, stored_error=ERROR))
    assert main(["eval", *FORMATS, "-m", "plot=heat.png"]) == 0
    assert (folder / "heat.png").stat().st_size > 5000


def test_row_without_what_is_to_be_plotted_is_measured_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def evaluate(experiment: Any, *, overrides: list[str], retrieval: Any, by_head: bool) -> ResultRow:
        asked.append(by_head)
        return rows()[1]

    monkeypatch.setattr("kvcfg.evaluation.measure.evaluate", evaluate)
    points = grid(["cache.kv_cache_format=int8", "plot=heat.png"], config_name="eval")
    measured.evaluate_one(None, points)  # type: ignore[arg-type]
    assert asked == [True]


def test_plot_that_cannot_be_drawn_is_told_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "plot=heat.txt"]) == 2
    assert "Try: plot=heat.png" in capsys.readouterr().err


def test_row_has_every_figure_of_a_run(folder: Path, save_model: Callable[[Path, int], Path], text_file: Path) -> None:
    text = [f"workload.text={text_file}", "workload.first_token=0", "workload.num_windows=1"]
    few = ["workload.window_tokens=40", "workload.decode_tokens=2", "cache.kv_cache_page_size=16"]
    model = ["model=hf", f"model.path={save_model(folder / 'random', 2)}", "devices=cpu", *text, *few]
    tasks = ["tasks=[needle,frequent_words]", "task_tokens=150", "task_prompts=2", "plot=heat.png"]
    points = grid([*model, "cache.kv_cache_format=int8", *tasks], config_name="eval")
    measured.evaluate_one(None, points)  # type: ignore[arg-type]
    [row] = ResultStore("results/rows.jsonl").rows().values()
    assert row.tasks is not None and sorted(row.tasks) == ["frequent_words", "needle"]
    assert {(score.num_prompts, score.prompt_tokens) for score in row.tasks.values()} == {(2, 150)}
    assert row.kl_by_depth is not None and len(row.kl_by_depth) == 8
    assert row.stored_error is not None and [len(heads) for heads in row.stored_error.keys] == [2, 2]
    assert row.first_token_ms is not None and row.first_token_ms > 0
    # Three pages of 16 tokens, and nothing of the prompts of tasks.
    assert row.peak_cache_bytes == 48 * row.bytes_per_token_allocated


def test_row_says_what_read_the_cache(
    tmp_path: Path,
    save_model: Callable[[Path, int], Path],
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = [f"workload.text={text_file}", "workload.first_token=0", "workload.num_windows=1"]
    few = ["workload.window_tokens=32", "workload.decode_tokens=2"]
    model = [f"model.path={save_model(tmp_path / 'random', 2)}", "devices=cpu", *text, *few]
    assert main(["eval", "model=hf", *model, "quantization=bits3", "output=json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"] == "gathered"
