"""The recorded answers of MAX, replayed; and whether the replay would notice."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RECORDS = sorted((HERE / "records").glob("*.jsonl.gz"))


def replay(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, HERE / "replay.py", *files], capture_output=True, text=True)


def answered(kind: str) -> dict[str, Any]:
    """An answered record of a kind with nothing odd about it, so that kvcfg answers the same."""
    for line in gzip.decompress(RECORDS[0].read_bytes()).splitlines():
        record: dict[str, Any] = json.loads(line)
        inputs = record["inputs"]
        is_plain = not inputs.get("config") and inputs.get("call", {}).get("dtype", "bfloat16") == "bfloat16"
        if record["kind"] == kind and record["ok"] and is_plain and 0 not in inputs.values():
            return record
    raise LookupError(kind)


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: str(file.name).partition(".")[0])
def test_no_answer_differs_without_a_reason(file: Path) -> None:
    done = replay(file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("num_device_blocks", "num_blocks"),
        ("estimated_memory_size", "bytes"),
        ("max_seq_len_fitting", "max_seq_len"),
        ("multi_params", "bytes_per_block"),
        ("to_params", "n_kv_heads_per_device"),
        ("dtype", "size_in_bits"),
        ("seq_len", "seq_len"),
    ],
)
def test_wrong_number_is_noticed(kind: str, name: str, tmp_path: Path) -> None:
    record = answered(kind)
    record["outputs"][name] += 7
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps(record))
    done = replay(changed)
    assert done.returncode == 1
    assert f"{record['id']} {kind} {record['max']} {name}" in done.stdout


CHANGES: dict[str, tuple[str, Any]] = {
    "symbolic_inputs": ("per_device.0.lookup_table.dtype", "int32"),
    "max_lengths": ("max_lengths", [[1, 2]]),
    "kv_metrics": ("prompt_tokens", 7),
    "memory_footprint": ("available_cache_memory", 7),
    "load_manager": ("total_pages", 70),
    "config_ops": ("result", "neither"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_answer_is_noticed(kind: str, tmp_path: Path) -> None:
    path, answer = CHANGES[kind]
    *places, name = path.split(".")
    for line in gzip.decompress(RECORDS[0].read_bytes()).splitlines():
        record = json.loads(line)
        where = record.get("outputs", {})
        if record["kind"] == kind and record["ok"] and path.split(".")[0] in where:
            break
    for place in places:
        where = where[int(place) if place.isdigit() else place]
    where[name] = answer
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps(record))
    done = replay(changed)
    assert done.returncode == 1
    assert f"{record['id']} {kind} {record['max']} {path}" in done.stdout


def test_refusal_that_kvcfg_does_not_share_is_noticed(tmp_path: Path) -> None:
    record = answered("to_params") | {"ok": False, "error": {"type": "ValueError", "message": "no"}}
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps(record))
    assert "accepted" in replay(changed).stdout


def test_answer_to_what_kvcfg_refuses_is_noticed(tmp_path: Path) -> None:
    record = answered("speculative_config")
    record["inputs"] = {"kwargs": {"relaxed_topk": 0}}
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps(record))
    assert "refused.relaxed_topk" in replay(changed).stdout


def test_unknown_kind_is_counted_and_not_failed(tmp_path: Path) -> None:
    later = tmp_path / "later.jsonl"
    later.write_text(json.dumps({"id": "0", "kind": "later", "max": "26.4.0", "inputs": {}, "ok": True, "outputs": {}}))
    done = replay(later)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "unexplained")
