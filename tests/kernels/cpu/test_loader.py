"""Kernels are compiled once, kept where only their owner can put them, and checked before they are loaded."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcfg.kernels.cpu import build, loader

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


def script(path: Path, what: str) -> Path:
    """A compiler that says who it is, and else does what is told here."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{what}\n')
    path.chmod(0o755)
    return path


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
        "kernels are not compiled, so slower Python paths are used: no C++ compiler; install g++ or name one in CXX"
    )


def test_what_stands_in_the_way_of_several_kernels_is_said_once(
    sources: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources.parent / "single.cpp").write_text('extern "C" int single() { return 1; }\n')
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert [loader.load_kernel(name) for name in ("many", "single", "many")] == [None] * 3
    assert len(caplog.messages) == 1


def test_a_cache_that_cannot_be_written_is_told_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out, err = run(tmp_path / "file", CXX=sys.executable)
    assert out == "none"
    assert err.endswith("set XDG_CACHE_HOME to a folder that you can write")


@needs_compiler
def test_after_an_interrupted_compilation_the_next_process_compiles(tmp_path: Path) -> None:
    slow = script(tmp_path / "cxx", "exec sleep 5")
    process = start(tmp_path, CXX=str(slow))
    folder = tmp_path / "kvcfg" / "kernels"
    while not (folder.is_dir() and libraries(tmp_path)):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    out, err = run(tmp_path)
    assert (len(out), err) == (64, "")


@needs_compiler
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    broken = script(tmp_path / "cxx", 'echo "disk is full" >&2\nexit 1')
    out, err = run(tmp_path, CXX=str(broken))
    assert out == "none"
    assert err.endswith("disk is full")
    assert libraries(tmp_path) == []


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources of a kernel `many`, in a place of its own with an empty cache."""
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "number.h").write_text("#pragma once\nint number();\ninline int more() { return 2; }\n")
    (folder / "number.cpp").write_text('#include "number.h"\nint number() { return 40; }\n')
    (folder / "answer.cpp").write_text('#include "number.h"\nextern "C" int answer() { return number() + more(); }\n')
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(loader, "HERE", tmp_path)
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "_told", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def answer() -> int | None:
    library = loader.load_kernel("many")
    return library and library.answer()


@needs_compiler
def test_a_folder_of_files_becomes_one_library(sources: Path) -> None:
    assert answer() == 42
    assert [path.name.split("-")[0] for path in libraries(sources.parent / "cache")] == ["many"]


@needs_compiler
@pytest.mark.parametrize("name", ["number.h", "number.cpp"])
def test_a_change_in_any_file_of_a_folder_is_compiled(sources: Path, name: str) -> None:
    assert answer() == 42
    text = (sources / name).read_text()
    (sources / name).write_text(text.replace("return 40", "return 50").replace("return 2", "return 12"))
    loader._loaded.clear()
    assert answer() == 52


@needs_compiler
def test_an_error_in_one_file_of_a_folder_is_quoted_and_leaves_nothing(
    sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sources / "answer.cpp").write_text("void f() {\n  int unused;\n  oops;\n}\n")
    assert (answer(), answer()) == (None, None)
    [message] = caplog.messages
    assert "answer.cpp:3:3: error:" in message and "oops" in message
    assert libraries(sources.parent / "cache") == []


@needs_compiler
def test_a_library_beside_its_sources_needs_no_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.compile_kernel("many", sources.parent)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert answer() == 42
    assert not (sources.parent / "cache").exists()


@needs_compiler
def test_a_library_beside_its_sources_is_not_trusted_once_they_differ(sources: Path) -> None:
    build.compile_kernel("many", sources.parent)
    (sources / "number.cpp").write_text('#include "number.h"\nint number() { return 50; }\n')
    assert answer() == 52


@needs_compiler
def test_a_damaged_library_beside_its_sources_is_passed_over(sources: Path) -> None:
    library = build.compile_kernel("many", sources.parent)
    library.write_bytes(library.read_bytes()[:-1])
    assert answer() == 42
    assert len(libraries(sources.parent / "cache")) == 1


@needs_compiler
def test_a_library_of_another_system_is_compiled_anew(sources: Path) -> None:
    library = build.compile_kernel("many", sources.parent)
    library.unlink()
    made_from = library.stem.rpartition("-")[0]
    alien = b"MZ: not a library of this system"
    (sources.parent / f"{made_from}-{build._digest(alien)}.so").write_bytes(alien)
    assert answer() == 42
    assert len(libraries(sources.parent / "cache")) == 1
