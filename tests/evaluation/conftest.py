"""Traces to replay: made up, so that they are small, and of every kind that the replay tells apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvcfg
from kvcfg.evaluation.replay import Replay
from kvcfg.evaluation.traces import Trace

Lines = list[dict[str, Any]]
Sweep = Callable[..., list[tuple[tuple[str, ...], Replay]]]


def conversations(seed: int, requests: int = 150, block: int = 512) -> Lines:
    """Users that come back with all that was said before, and some that share a system prompt."""
    rng = random.Random(seed)
    fresh = iter(range(10**6))
    system = [next(fresh) for _ in range(3)]
    talks: list[list[int]] = []
    lines = []
    for number in range(requests):
        if not talks or rng.random() < 0.3:
            talks.append([*system[: rng.randrange(4)], next(fresh)])
        talk = rng.choice(talks[-8:])
        talk += [next(fresh) for _ in range(rng.randrange(1, 4))]
        tail = rng.randrange(1, block + 1)
        blocks = [*talk, next(fresh)]
        tokens = block * len(talk) + tail
        lines.append({"timestamp": number, "input_length": tokens, "output_length": 9, "hash_ids": blocks})
    return lines


@pytest.fixture(scope="session")
def talks() -> Callable[..., Lines]:
    """Makes lines of a trace from a seed."""
    return conversations


@pytest.fixture
def trace_of(tmp_path: Path) -> Callable[..., Trace]:
    """Writes lines (objects, or text as it is) to a file and reads the trace in it."""

    def read(lines: list[Any], block_size: int = 512) -> Trace:
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return Trace.read(path, block_size)

    return read


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """Caches are taken to be small, so that the pages that kernels are timed on are few; returns their bytes."""
    for module in ("kernel_bench", "kernel_pages", "memory_reader"):
        monkeypatch.setattr(f"kvcfg.evaluation.{module}.cold_bytes", lambda: 1 << 20)
    return 1 << 20


@pytest.fixture
def sweep(tmp_path: Path, talks: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Replays every point of a grid."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.jsonl").write_text("\n".join(json.dumps(line) for line in talks(1)))
    base = ["model=llama-3.1-8b", "devices=h100", "workload.trace=trace.jsonl"]

    def run(*overrides: str, **settings: Any) -> list[tuple[tuple[str, ...], Replay]]:
        points = [(point.overrides, point.experiment) for point in kvcfg.grid([*base, *overrides])]
        return [(given, kvcfg.replay_trace(made, **settings)) for given, made in points if made]

    return run
