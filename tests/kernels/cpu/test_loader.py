"""Kernels are compiled once, kept where only their owner can put them, and checked before they are loaded."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

CODE = (
    "from array import array\n"
    "from kvcfg.kernels.cpu.hash_chain import compiled_chain\n"
    "chain = compiled_chain('sha256')\n"
    "print('none' if chain is None else chain(bytes(32), array('i', range(32)), 8, 0, 4)[-1].hex())\n"
)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    everything = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", CODE], env=everything, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(cache: Path, **environment: str) -> tuple[str, str]:
    """What a new process prints, and says on stderr."""
    process = start(cache, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "kvcfg" / "kernels").iterdir())


@needs_compiler
def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    first, said = run(tmp_path)
    (library,) = libraries(tmp_path)
    made = library.stat().st_mtime_ns
    assert (run(tmp_path), said) == ((first, ""), "")
    assert libraries(tmp_path) == [library]
    assert library.stat().st_mtime_ns == made


@needs_compiler
def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    run(tmp_path)
    assert stat.S_IMODE((tmp_path / "kvcfg" / "kernels").stat().st_mode) == 0o700


@needs_compiler
def test_a_library_that_was_changed_is_made_anew(tmp_path: Path) -> None:
    right, _ = run(tmp_path)
    (library,) = libraries(tmp_path)
    library.write_bytes(library.read_bytes()[:1000])
    assert run(tmp_path) == (right, "")
    assert len(libraries(tmp_path)[0].read_bytes()) > 1000


@needs_compiler
def test_processes_that_start_at_once_all_get_a_whole_library(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(4)]
    results = {process.communicate(timeout=120) for process in processes}
    assert len(results) == 1
    assert next(iter(results))[1] == ""
    assert {path.suffix for path in libraries(tmp_path)} == {".so"}


@needs_compiler
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kvcfg" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    out, err = run(tmp_path)
    assert out == "none"
    assert f"{folder} must belong to you alone" in err


def test_without_a_compiler_the_reason_is_said_once(tmp_path: Path) -> None:
    out, err = run(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert out == "none"
    assert err == (
        "kernel hash_chain is not compiled, so the slower Python path is used: "
        "no C++ compiler; install g++ or name one in CXX"
    )


@needs_compiler
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "cxx"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "disk is full" >&2\nexit 1\n')
    broken.chmod(0o755)
    out, err = run(tmp_path, CXX=str(broken))
    assert out == "none"
    assert err.endswith("disk is full")
    assert libraries(tmp_path) == []
