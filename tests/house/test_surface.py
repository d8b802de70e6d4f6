"""What `import kvcfg` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvcfg

HEAVY = ("torch", "transformers", "hydra", "omegaconf", "rich")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_public_names_are_complete_and_sorted() -> None:
    assert sorted(kvcfg.__all__) == sorted(set(kvcfg.__all__))
    assert all(getattr(kvcfg, name) is not None for name in kvcfg.__all__)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvcfg.nothing  # noqa: B018


def test_import_and_config_classes_load_nothing_heavy() -> None:
    code = f"""
import sys
from kvcfg import ExperimentConfig, KVCacheConfig, compose, grid, plan, validate, FORMATS, DType, DeviceRef
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = run_python(code)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_composing_and_planning_load_neither_torch_nor_transformers() -> None:
    code = """
import sys, kvcfg
kvcfg.plan(kvcfg.compose(["model=llama-3.1-8b", "devices=h100x8"]))
print([name for name in ("torch", "transformers", "rich") if name in sys.modules])
"""
    done = run_python(code)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_config_works_where_torch_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import kvcfg
plan = kvcfg.plan(kvcfg.compose(["model=llama-3.1-8b", "devices=h100x8"]))
print(plan.num_pages > 0)
"""
    done = run_python(code)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr
