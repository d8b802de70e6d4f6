"""Traces to replay: made up, so that they are small, and of every kind that the replay tells apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcfg.evaluation.traces import Trace

Lines = list[dict[str, Any]]


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
