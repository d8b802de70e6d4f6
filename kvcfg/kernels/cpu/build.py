"""Compiles a kernel into a library whose name tells what it was made from, and its own content:

    <kernel>-<sources, flags, architecture and whatever else the caller tells>-<content>.so

No flag speaks of this machine's CPU: code for newer instructions is chosen when it runs. A wheel is built with
this file alone, so it imports nothing of kvcfg.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread")
_TIMEOUT_S = 120.0


class Unusable(RuntimeError):
    """Why there can be no compiled kernel here."""


BUILD_ERRORS = (OSError, Unusable, subprocess.SubprocessError)


def kernels() -> list[str]:
    """Names of all kernels: a file `<name>.cpp`, or a folder `<name>` of .cpp and .h files, beside this file."""
    return sorted({path.relative_to(HERE).parts[0].removesuffix(".cpp") for path in HERE.rglob("*.cpp")})


def compiler() -> str:
    """Path of the C++ compiler: what $CXX names, g++ by default.

    Raises:
        Unusable: if there is none.
    """
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        raise Unusable("no C++ compiler; install g++ or name one in CXX")
    return found


def compile_kernel(name: str, folder: Path, *also_from: str) -> Path:
    """Compile a kernel's files side by side, link them, and put the library into `folder` in one step.

    Processes that do so at once each work in a folder of their own; whoever comes last wins, with a whole library.

    Raises:
        OSError, Unusable, SubprocessError: `BUILD_ERRORS`, which `reason` puts in a line.
    """
    cxx = compiler()
    sources = [path for path in _sources(name) if path.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [f"{work}/{source.stem}.o" for source in sources]
        commands = [(cxx, *FLAGS, "-c", str(source), "-o", made) for source, made in zip(sources, objects, strict=True)]
        list(pool.map(run, commands))
        linked = Path(work) / "library"
        run((cxx, *FLAGS, "-shared", *objects, "-o", str(linked)))
        library = folder / f"{_stem(name, also_from)}-{_digest(linked.read_bytes())}.so"
        os.replace(linked, library)
    return library


def whole_libraries(name: str, folder: Path, *also_from: str) -> Iterator[Path]:
    """The libraries in `folder` that were made from just this, and whose content is what their names say."""
    stem = _stem(name, also_from)
    for library in sorted(folder.glob(f"{stem}-*.so")):
        if library.stem == f"{stem}-{_digest(library.read_bytes())}":
            yield library


def run(command: tuple[str, ...]) -> str:
    """What a command prints.

    Raises:
        OSError, SubprocessError: if it cannot be started, fails, or takes minutes.
    """
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout


def reason(error: Exception) -> str:
    """The line that says best why there is no library."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])


def _sources(name: str) -> list[Path]:
    folder = HERE / name
    if folder.is_dir():
        return sorted(path for path in folder.iterdir() if path.suffix in {".cpp", ".h"})
    return [HERE / f"{name}.cpp"]


def _stem(name: str, also_from: tuple[str, ...]) -> str:
    told = [part.encode() for part in (*FLAGS, platform.machine(), *also_from)]
    sources = [part for path in _sources(name) for part in (path.name.encode(), path.read_bytes())]
    return f"{name}-{_digest(*told, *sources)}"


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:32]
