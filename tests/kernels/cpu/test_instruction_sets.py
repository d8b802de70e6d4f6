"""Every instruction set's code, not only that of this CPU's best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcfg.kernels.cpu.loader import load_kernel


@pytest.mark.skipif(load_kernel("pages") is None, reason="there is no compiler")
@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_attention_matches_the_reference_with_fewer_instructions(instructions: str) -> None:
    claims = "every_format or prompt_over or sees_nothing or latents"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name("test_attend.py")), "-q", "-k", claims],
        env={**os.environ, "KVCFG_CPU": instructions},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
