"""Environments of engines, made by `make engines`, and what is run in them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(os.environ.get("KVCFG_PEERS", Path(__file__).parents[2] / ".peers"))
SIDES = Path(__file__).parent / "sides"

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask() -> Ask:
    """Runs a side in its engine's environment and returns the JSON of its last line."""

    def run(environment: str, side: str, *arguments: object) -> dict[str, Any]:
        python = PEERS / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no {environment} in {PEERS}: make engines")
        command = [str(python), str(SIDES / f"{side}_side.py"), *map(str, arguments)]
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        without = ("PYTHONPATH", "VLLM_CPU_KVCACHE_SPACE")
        variables = {name: value for name, value in (os.environ | quiet).items() if name not in without}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer

    return run
