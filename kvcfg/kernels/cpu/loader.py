"""Loads a kernel's library: the one that a wheel brought along, else one compiled the first time it is needed.

A wheel's libraries lie beside their sources. One that was compiled here is kept in a folder that only its owner can
enter, `$XDG_CACHE_HOME/kvcfg/kernels/`, under a name that tells the compiler too. Either is loaded only if it was
made from these very sources and its content is what its name says; a file that was cut short or changed is made
anew.
"""

from __future__ import annotations

import ctypes
import logging
import os
import stat
from functools import cache
from pathlib import Path
from threading import Lock

from kvcfg.kernels.cpu.build import (
    BUILD_ERRORS,
    HERE,
    Unusable,
    compile_kernel,
    compiler,
    reason,
    run,
    whole_libraries,
)
from kvcfg.kernels.cpu.threads import share_threads

_log = logging.getLogger("kvcfg")
_lock = Lock()
_loaded: dict[str, ctypes.CDLL | None] = {}
_told: set[str] = set()


def load_kernel(name: str) -> ctypes.CDLL | None:
    """The library of a kernel: `<name>.cpp`, or all of a folder `<name>`, beside this file.

    $CXX names the compiler, g++ by default. None if the library cannot be had; what stands in the way
    is said once in the log, however many kernels it concerns.
    """
    with _lock:
        if name not in _loaded:
            try:
                _loaded[name] = library = _built_in(name) or _compiled_here(name)
                share_threads(library)
            except BUILD_ERRORS as error:
                _loaded[name] = None
                if (why := reason(error)) not in _told:
                    _told.add(why)
                    _log.warning("kernels are not compiled, so slower Python paths are used: %s", why)
        return _loaded[name]


def _built_in(name: str) -> ctypes.CDLL | None:
    """What the wheel brought, unless it was built for a system whose libraries this one lacks."""
    for library in whole_libraries(name, HERE):
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            _log.info("%s is compiled anew: %s", library.name, error)
    return None


def _compiled_here(name: str) -> ctypes.CDLL:
    folder, made_by = _private_folder(), _identity(compiler())
    library = next(whole_libraries(name, folder, made_by), None) or compile_kernel(name, folder, made_by)
    return ctypes.CDLL(str(library))


def _private_folder() -> Path:
    """The cache folder, made if it is missing; refused if others could have put something there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "kvcfg" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"{error}; set XDG_CACHE_HOME to a folder that you can write") from error
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise Unusable(f"{folder} must belong to you alone: chmod 700 {folder}")
    return folder


@cache
def _identity(cxx: str) -> str:
    """What a compiler says it is."""
    return run((cxx, "--version"))
