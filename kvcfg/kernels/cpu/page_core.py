"""The compiled core of the page ledger: its functions, and what it leaves behind for the caller to read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any, NamedTuple

from kvcfg.kernels.cpu.hash_chain import NAME_BYTES
from kvcfg.kernels.cpu.loader import load_kernel

LIFETIME_EXPONENTS = range(-64, 64)
"""Lifetimes are counted by powers of two from 2^-64 to 2^63 seconds, after a count of those without one."""

NO_IDS = -1
"""The number of ids of a sequence whose ids will never be known."""

_I64 = c_int64


class CoreHead(ctypes.Structure):
    """What a core counts, and what its last call found."""

    _fields_ = [
        *(
            (name, _I64)
            for name in ("num_free", "num_cached", "evictable", "evictions", "input_tokens", "cache_tokens")
        ),
        *(
            (name, _I64)
            for name in ("cached", "length", "first", "needed", "free", "evictable_left", "in_all", "out_size")
        ),
        ("out", c_void_p),
        ("lifetimes", _I64 * (len(LIFETIME_EXPONENTS) + 1)),
    ]


class RowHead(ctypes.Structure):
    """What a core keeps of a sequence."""

    _fields_ = [(name, _I64) for name in ("length", "final", "closed", "counted", "num_pages", "num_ids", "num_names")]


class CoreFunctions(NamedTuple):
    """The functions of `page_core.cpp`; a core and a row are addresses."""

    new: Callable[..., int]
    delete: Callable[..., None]
    delete_row: Callable[..., None]
    claim: Callable[..., int | None]
    extend: Callable[..., None]
    alloc: Callable[..., int]
    forecast: Callable[..., int]
    alloc_batch: Callable[..., int]
    commit: Callable[..., int]
    truncate: Callable[..., None]
    fork: Callable[..., int | None]
    release: Callable[..., None]
    run: Callable[..., None]
    wanted: Callable[..., int]
    names: Callable[..., int]
    pages: Callable[..., None]
    hold: Callable[..., None]
    drop: Callable[..., None]
    forget_unused: Callable[..., int]
    state: Callable[..., None]
    free_pages: Callable[..., None]
    page_names: Callable[..., int]


_CORE = _ROW = _IDS = c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "new": (c_void_p, _I64, _I64, c_size_t, c_void_p, c_void_p),
    "delete": (None, _CORE),
    "delete_row": (None, _ROW),
    "claim": (_ROW, _CORE, c_void_p, _I64, c_int, c_char_p, c_char_p, _I64),
    "extend": (None, _ROW, _IDS, _I64),
    "alloc": (c_int, _CORE, _ROW, _I64, _I64, c_double),
    "forecast": (c_int, _CORE, _ROW, _I64, _I64),
    "alloc_batch": (c_int, _CORE, c_void_p, _I64, _I64, _I64, _IDS, c_double),
    "commit": (_I64, _CORE, c_void_p, _I64, _I64, _I64, c_double),
    "truncate": (None, _CORE, _ROW, _I64),
    "fork": (_ROW, _CORE, _ROW, c_double),
    "release": (None, _CORE, _ROW, c_int),
    "run": (None, _CORE, c_char_p, _I64),
    "wanted": (_I64, _CORE, _ROW, _I64),
    "names": (c_void_p, _ROW),
    "pages": (None, _CORE, _ROW),
    "hold": (None, _CORE, c_void_p, _I64),
    "drop": (None, _CORE, c_void_p, _I64),
    "forget_unused": (_I64, _CORE),
    "state": (None, _CORE),
    "free_pages": (None, _CORE),
    "page_names": (c_void_p, _CORE),
}


@cache
def core_functions() -> CoreFunctions | None:
    """The functions of the compiled core; None if it cannot be had here."""
    library = load_kernel("page_core")
    if library is None:
        return None
    functions = []
    for name in CoreFunctions._fields:
        function = getattr(library, f"kvcfg_core_{name}")
        function.restype, *arguments = _SIGNATURES[name]
        function.argtypes = arguments
        functions.append(function)
    return CoreFunctions(*functions)


def hashing_addresses(algorithm: str) -> tuple[int, int] | tuple[()]:
    """Where the compiled hash chain of an algorithm is, and what makes int32 of int64; empty if it is not compiled."""
    library = load_kernel("hash_chain") if algorithm in NAME_BYTES else None
    if library is None:
        return ()
    chain, narrow = getattr(library, f"kvcfg_{algorithm}_chain"), library.kvcfg_narrow
    return ctypes.cast(chain, c_void_p).value or 0, ctypes.cast(narrow, c_void_p).value or 0
