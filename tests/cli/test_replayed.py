"""`kvcfg replay` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcfg.cli import main

ROOT = Path(__file__).parents[2]
BASE = ["replay", "model=llama-3.1-8b", "devices=h100", "cache.kv_cache_page_size=8"]


@pytest.fixture(autouse=True)
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a trace of three prompts that begin alike."""
    monkeypatch.chdir(tmp_path)
    prompts = [{"text": f"You are a helpful assistant. {end}"} for end in ("What is a page?", "And you?", "Who?")]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return tmp_path / "trace.jsonl"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main([*BASE, *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_one_replay_is_printed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "workload.trace=trace.jsonl")
    assert code == 0 and "trace.jsonl: 3 requests, 114 prompt tokens" in out
    assert "unbounded" in out and "plan" in out


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "workload.trace=trace.jsonl", "output=json", "capacities=[64,unbounded]")
    data = json.loads(out)
    assert code == 0 and "workload.trace=trace.jsonl" in data["overrides"]
    assert [row["capacity"] for row in data["capacities"]] == ["64", "unbounded"]
    assert data["capacities"][1]["hit_rate"] == pytest.approx(2 * 24 / 114)


def test_sweep_prints_a_json_list(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "workload.trace=trace.jsonl", "output=json", "cache.eviction=lru,lfu", "-m")
    assert [row["eviction"] for row in json.loads(out)] == ["lru", "lfu"]


def test_sweep_runs_through_traces_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"text": "another"}\n')
    code, out, _ = run(capsys, "workload.trace=trace.jsonl,other.jsonl", "-m")
    assert code == 0 and out.count("\ntrace.jsonl ") == out.count("\nother.jsonl ") == 2


def test_verb_needs_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and "workload.trace=null: must be" in err


def test_every_point_is_checked_before_anything_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "blocks.jsonl").write_text('{"input_length": 512, "hash_ids": [1]}\n')
    bad = "workload.trace=trace.jsonl,blocks.jsonl,nothing.jsonl"
    code, out, err = run(capsys, bad, "cache.kv_cache_page_size=48", "plot=a.png", "-m")
    assert (code, out) == (2, "") and not (tmp_path / "a.png").exists()
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        "cache.kv_cache_page_size=48",
        "workload.trace=nothing.jsonl",
    ]


def test_bad_line_is_one_line_with_its_number(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    trace.write_text('{"text": "x"}\n{"text": 5}\n')
    code, _, err = run(capsys, "workload.trace=trace.jsonl")
    assert code == 2 and len(err.splitlines()) == 1 and "trace.jsonl, line 2: text must be text" in err


@pytest.mark.parametrize("value", ["[1X]", "1M", "[]", "[0]"])
def test_bad_capacities_are_refused_when_composed(capsys: pytest.CaptureFixture[str], value: str) -> None:
    code, _, err = run(capsys, "workload.trace=trace.jsonl", f"capacities={value}")
    assert code == 2 and "capacities=" in err


def test_plot_is_written_and_told_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "workload.trace=trace.jsonl", "plot=out/a.svg", "output=json")
    assert code == 0 and json.loads(out) and err == "plot: out/a.svg\n"
    assert (tmp_path / "out" / "a.svg").exists()


def test_missing_matplotlib_stops_before_anything_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcfg.evaluation.plot_files.find_spec", lambda name: None)
    code, out, err = run(capsys, "workload.trace=trace.jsonl", "plot=a.svg")
    assert (code, out) == (1, "") and "pip install kvcfg[plot]" in err


def test_broken_results_file_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    code, _, err = run(capsys, "workload.trace=trace.jsonl", "results=rows.jsonl")
    assert code == 1 and "rows.jsonl:1 is no result row" in err


def test_replay_works_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    block = "sys.modules['torch'] = sys.modules['transformers'] = sys.modules['matplotlib'] = None"
    code = f"import sys; {block}; from kvcfg.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*BASE, "workload.trace=trace.jsonl", "cache.eviction=lru,lfu", "-m"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.jsonl"]


def test_script_runs_on_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "replay.py"), *BASE[1:], "workload.trace=trace.jsonl"]
    done = subprocess.run(
        [*command, "output=json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["trace"]["requests"] == 3, done.stderr
