"""Rows go to a file and come back; the table and the gate say what they show."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from kvcfg.errors import GateError, KvcfgError
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore
from kvcfg.results.stored_error import StoredError
from kvcfg.results.table import render
from kvcfg.results.task_score import TaskScore
from kvcfg.results.task_table import render_tasks


def row_of(**changes: Any) -> ResultRow:
    base: dict[str, Any] = {
        "fingerprint": "f0",
        "model": "tiny",
        "device": "cpu",
        "format": "int8",
        "recipe": "int8, dynamic scales per token_head in float32",
        "page_size": 128,
        "bytes_per_token_planned": 12240,
        "bytes_per_token_allocated": 12240.0,
        "bits_per_element": 8.5,
        "bits_effective": 8.5,
        "num_predictions": 2046,
        "ppl": 9.311,
        "ppl_reference": 9.303,
        "kl": 8.15e-4,
        "kl_ci": (7.2e-4, 9.2e-4),
        "kl_p99": 5e-3,
        "noise_floor": 6.6e-12,
        "top1": 0.984,
        "clip_rate": 0.0,
        "experimental": False,
        "decode_tokens_per_s": 10.2,
        "text_sha": "t0",
        "overrides": ("cache.kv_cache_format=int8",),
        "config": {"cache": {"kv_cache_format": "int8"}},
        "versions": {"torch": "2.13.0"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return ResultRow(**{**base, **changes})


def append_rows(path: str, worker: int) -> None:
    store = ResultStore(path)
    for number in range(50):
        store.append(row_of(fingerprint=f"{worker}-{number}"))


def test_row_comes_back_from_its_line_unchanged() -> None:
    assert ResultRow.from_json(row_of().to_json()) == row_of()


def test_row_of_a_version_that_did_not_say_what_read_the_cache_is_read() -> None:
    data = json.loads(row_of(attention="kernels").to_json())
    del data["attention"]
    assert ResultRow.from_json(json.dumps(data)).attention is None


def test_table_is_the_same_whatever_read_the_cache() -> None:
    assert render([row_of(attention="kernels")]) == render([row_of(attention="gathered")])


NEEDLE = TaskScore(right=0.75, right_reference=1.0, num_prompts=8, prompt_tokens=1024)
"""A score."""


def test_row_with_scores_of_tasks_comes_back_unchanged() -> None:
    row = row_of(tasks={"needle": NEEDLE}, kl_by_depth=[1e-3, 2e-3], first_token_ms=300.0, peak_cache_bytes=12345)
    assert ResultRow.from_json(row.to_json()) == row


def test_row_with_errors_by_head_comes_back_unchanged() -> None:
    row = row_of(stored_error=StoredError(keys=[[0.1, None], []], values=[[0.2, 0.3], []]))
    assert ResultRow.from_json(row.to_json()) == row


def test_row_of_a_version_without_depths_tasks_and_peaks_is_read() -> None:
    data = json.loads(row_of(tasks={"needle": NEEDLE}).to_json())
    for key in ("stored_error", "kl_by_depth", "first_token_ms", "peak_cache_bytes", "tasks"):
        del data[key]
    assert ResultRow.from_json(json.dumps(data)) == row_of()


def test_damaged_scores_name_the_row() -> None:
    data = json.loads(row_of().to_json()) | {"tasks": {"needle": {"right": 1.0}}}
    with pytest.raises(KvcfgError, match="here is no result row"):
        ResultRow.from_json(json.dumps(data), "here")


def test_table_is_no_wider_for_depths_tasks_and_peaks() -> None:
    row = row_of(tasks={"needle": NEEDLE}, kl_by_depth=[1e-3], first_token_ms=300.0, peak_cache_bytes=12345)
    assert render([row]) == render([row_of()])


def test_table_of_tasks_has_full_precision_beside_every_score() -> None:
    rows = [row_of(tasks={"needle": NEEDLE}), row_of(format="int4", tasks={"needle": replace(NEEDLE, right=0.5)})]
    lines = render_tasks(rows, ["needle"]).splitlines()
    assert lines[0].split() == ["model", "format", "needle"]
    assert (lines[2].split()[1:], lines[3].split()[1:]) == (["int8", "75%", "/", "100%"], ["int4", "50%", "/", "100%"])
    assert "prompts of 1,024 tokens, 8 a task" in lines[-1]


def test_line_without_a_key_says_which() -> None:
    data = json.loads(row_of().to_json())
    del data["kl"]
    with pytest.raises(KvcfgError, match=r"here is no result row: KeyError\('kl'\)"):
        ResultRow.from_json(json.dumps(data), "here")


def test_store_keeps_the_later_of_two_rows(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "deep" / "rows.jsonl")
    assert store.find("f0") is None
    store.append(row_of())
    store.append(row_of(kl=0.5))
    found = store.find("f0")
    assert found is not None and found.kl == 0.5
    assert len(store.path.read_text().splitlines()) == 2


def test_damaged_file_names_its_line(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "rows.jsonl")
    store.append(row_of())
    with store.path.open("a") as file:
        file.write('{"fingerprint":\n')
    with pytest.raises(KvcfgError, match=r"rows\.jsonl:2 is no result row"):
        store.rows()


def test_processes_append_without_mixing_lines(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    context = get_context("spawn")
    workers = [context.Process(target=append_rows, args=(path, worker)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(ResultStore(path).rows()) == 100


def test_gate_passes_a_good_row_on() -> None:
    row = row_of()
    assert row.require(max_kl=1e-3) is row
    assert row.require() is row


@pytest.mark.parametrize("kl", [2e-3, float("nan")])
def test_gate_refuses_a_bad_row_with_figures(kl: float) -> None:
    with pytest.raises(GateError, match=r"int8 on tiny: KL .* above the gate 0\.001"):
        row_of(kl=kl).require(max_kl=1e-3)


def test_table_shows_each_row_and_the_noise_floor() -> None:
    text = render([row_of(), row_of(format="bfloat16", bits_per_element=16.0)])
    lines = text.splitlines()
    assert "12,240" in lines[2] and "8.15e-04" in lines[2] and "bfloat16" in lines[3]
    assert "6.6e-12" in text and "2,046 predictions" in text and "9.303 (tiny)" in text


def test_table_tells_when_allocation_differs_from_plan() -> None:
    text = render([row_of(bytes_per_token_allocated=13000.0)])
    assert "12,240 (allocated 13,000)" in text
    assert "as planned, and as allocated" not in text


def test_row_of_a_version_that_knew_fewer_figures_is_read() -> None:
    data = json.loads(row_of().to_json())
    del data["clip_rate"], data["experimental"]
    read = ResultRow.from_json(json.dumps(data))
    assert (read.clip_rate, read.experimental) == (None, False)
