"""Whether the replay of a trace would notice a ledger that does something else."""

from __future__ import annotations

import copy
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import traces  # noqa: E402


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """A long trace of the newest release with hits, refusals and repeated calls."""
    lines = gzip.decompress((HERE / "records" / "max_26_7.jsonl.gz").read_bytes()).splitlines()
    records = [item for item in map(json.loads, lines) if item["kind"] == "manager_trace"]
    return max(records, key=lambda item: item["outputs"]["states"][-1].get("cache_tokens", 0))


def test_a_trace_agrees_but_for_what_is_counted_twice(record: dict[str, Any]) -> None:
    assert traces.replay(record).name in ("same", "better: 29")


def change(record: dict[str, Any], edit: Any) -> dict[str, Any]:
    """The record with its last full state changed."""
    changed = copy.deepcopy(record)
    edit([state for state in changed["outputs"]["states"] if state.get("reqs")][-1])
    return changed


def other_block(state: dict[str, Any]) -> None:
    request = next(item for item in reversed(state["reqs"].values()) if item["blocks"])
    request["blocks"][-1] += 1


def other_free(state: dict[str, Any]) -> None:
    state["free"][0] -= 1


def other_committed(state: dict[str, Any]) -> None:
    next(iter(state["reqs"].values()))["committed"] += 1


def other_count(state: dict[str, Any]) -> None:
    state["input_tokens"] += 1


def other_error(state: dict[str, Any]) -> None:
    state["error"] = {"type": "ValueError"}


@pytest.mark.parametrize("edit", [other_block, other_free, other_committed, other_count, other_error])
def test_a_changed_state_is_noticed(record: dict[str, Any], edit: Any) -> None:
    assert traces.replay(change(record, edit)).name == "different"
