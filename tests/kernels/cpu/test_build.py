"""Kernels are found by their sources, and a library is named by all that it is made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvcfg.kernels.cpu import build

TARGETED = [path for path in sorted(build.HERE.rglob("*.cpp")) if "#pragma GCC target" in path.read_text()]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with the sources of two kernels, one of a file and one of a folder."""
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "a.cpp").write_text('extern "C" int a() { return 1; }\n')
    (tmp_path / "many" / "b.cpp").touch()
    (tmp_path / "one.cpp").touch()
    monkeypatch.setattr(build, "HERE", tmp_path)
    return tmp_path


def test_kernels_are_the_files_and_folders_of_sources(here: Path) -> None:
    assert build.kernels() == ["many", "one"]


@needs_compiler
def test_a_library_is_found_again_by_what_it_was_made_from(here: Path) -> None:
    library = build.compile_kernel("many", here, "this compiler")
    assert list(build.whole_libraries("many", here, "this compiler")) == [library]


@needs_compiler
def test_a_library_of_another_compiler_is_not_found(here: Path) -> None:
    build.compile_kernel("many", here, "this compiler")
    assert list(build.whole_libraries("many", here, "another compiler")) == []


@needs_compiler
def test_a_file_that_got_another_name_is_another_source(here: Path) -> None:
    build.compile_kernel("many", here)
    (here / "many" / "a.cpp").rename(here / "many" / "c.cpp")
    assert list(build.whole_libraries("many", here)) == []


@needs_compiler
def test_compilation_leaves_only_the_library(here: Path) -> None:
    library = build.compile_kernel("many", here)
    assert {path.name for path in here.iterdir()} == {"many", "one.cpp", library.name}


def test_the_reason_is_the_line_with_the_error() -> None:
    error = RuntimeError("x.cpp: In function 'f':\nx.cpp:1:1: error: wrong\nmore")
    assert build.reason(error) == "x.cpp:1:1: error: wrong"


def test_a_reason_without_words_is_the_kind_of_error() -> None:
    assert build.reason(OSError()) == "OSError"


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("source", TARGETED, ids=lambda path: path.stem)
def test_code_for_newer_instructions_gives_no_function_to_other_files(source: Path, tmp_path: Path) -> None:
    """The linker keeps one of the inline functions that several files share, so an older CPU could get the newer."""
    made = str(tmp_path / "made.o")
    build.run((build.compiler(), *build.FLAGS, "-c", str(source), "-o", made))
    symbols = [line.split()[-2:] for line in build.run(("nm", "--defined-only", made)).splitlines()]
    assert [name for kind, name in symbols if kind in "WVu"] == []
