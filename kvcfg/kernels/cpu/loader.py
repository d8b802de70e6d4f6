"""Compiles a kernel the first time it is needed, and loads it from then on.

A library is kept in a folder that only its owner can enter, under a name that tells its source, compiler and
flags, the CPU, and its own content:

    $XDG_CACHE_HOME/kvcfg/kernels/<kernel>-<what it was made from>-<what it is>.so

It is loaded only if its content is what the name says, so a file that was cut short or changed is made anew.
Processes that start at once each compile into a file of their own and rename it; whoever comes last wins, and
all of them load a whole one.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
_TIMEOUT_S = 120.0

_log = logging.getLogger("kvcfg")
_lock = Lock()
_loaded: dict[str, ctypes.CDLL | None] = {}


def load_kernel(name: str) -> ctypes.CDLL | None:
    """The compiled library of `<name>.cpp` beside this file; None, said once, if it cannot be had.

    $CXX names the compiler, g++ by default.
    """
    with _lock:
        if name not in _loaded:
            try:
                _loaded[name] = _load(Path(__file__).with_name(f"{name}.cpp"))
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                _log.warning("kernel %s is not compiled, so the slower Python path is used: %s", name, _reason(error))
                _loaded[name] = None
        return _loaded[name]


class _Unusable(RuntimeError):
    """Why there can be no compiled kernel here."""


def _load(source: Path) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise _Unusable("no C++ compiler; install g++ or name one in CXX")
    folder = _private_folder()
    made_from = _digest(source.read_bytes(), _identity(compiler).encode(), " ".join(FLAGS).encode(), _cpu().encode())
    stem = f"{source.stem}-{made_from}"
    for library in sorted(folder.glob(f"{stem}-*.so")):
        if library.stem == f"{stem}-{_digest(library.read_bytes())}":
            return ctypes.CDLL(str(library))
        library.unlink(missing_ok=True)
    return ctypes.CDLL(str(_compile(compiler, source, folder, stem)))


def _compile(compiler: str, source: Path, folder: Path, stem: str) -> Path:
    handle, unfinished = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", unfinished, str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        library = folder / f"{stem}-{_digest(Path(unfinished).read_bytes())}.so"
        os.replace(unfinished, library)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return library


def _private_folder() -> Path:
    """The cache folder, made if it is missing; refused if others could have put something there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "kvcfg" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise _Unusable(f"{folder} must belong to you alone: chmod 700 {folder}")
    return folder


@cache
def _identity(compiler: str) -> str:
    """What a compiler says it is."""
    return subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
    ).stdout


@cache
def _cpu() -> str:
    """Architecture and features of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {features}"


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:32]


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    text = getattr(error, "stderr", None) or str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
