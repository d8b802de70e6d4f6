"""The compiled hash chain: names of all pages of a prompt in one call, from token ids in one more."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import lru_cache
from struct import Struct

from kvcfg.kernels.cpu.loader import load_kernel

HashChain = Callable[[bytes, "array[int]", int, int, int], list[bytes]]
"""(parent name, ids, page size, first page, number of pages) -> names."""

NAME_BYTES = {"sha256": 32, "xxh3_128": 16}
"""Algorithms that are compiled, and how long their names are."""


def compiled_chain(algorithm: str, *, plain: bool = False) -> HashChain | None:
    """The chain of an algorithm; None if it is not compiled here.

    Args:
        algorithm: a name in `NAME_BYTES`, or one that is not compiled.
        plain: whether SHA-256 does without the CPU's own instructions.
    """
    library = load_kernel("hash_chain") if algorithm in NAME_BYTES else None
    if library is None:
        return None
    width = NAME_BYTES[algorithm]
    function = getattr(library, f"kvcfg_{algorithm}_chain")
    last = ctypes.c_int if algorithm == "sha256" else ctypes.c_char_p
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    function.argtypes, function.restype = (ctypes.c_char_p, pointer, size, size, ctypes.c_char_p, last), None

    def chain(parent: bytes, ids: array[int], page_size: int, first: int, count: int) -> list[bytes]:
        if len(parent) != width or (first + count) * page_size > len(ids):
            raise ValueError(f"{count} pages from page {first} do not follow from {len(parent)} bytes, {len(ids)} ids")
        page_bytes = page_size * ids.itemsize
        names = ctypes.create_string_buffer(count * width)
        extra = int(plain) if algorithm == "sha256" else ctypes.create_string_buffer(width + page_bytes)
        function(parent, ids.buffer_info()[0] + first * page_bytes, page_bytes, count, names, extra)
        return list(_names(count, width).unpack(names.raw))

    return chain


def narrowed(wide: bytes) -> array[int] | None:
    """Native int64 as int32; None if it is not compiled here, or a number does not fit."""
    library = load_kernel("hash_chain")
    if library is None:
        return None
    ids = array("i", bytes(len(wide) // 2))
    target = ctypes.c_void_p(ids.buffer_info()[0])
    return ids if library.kvcfg_narrow(wide, ctypes.c_size_t(len(ids)), target) else None


@lru_cache(maxsize=1024)
def _names(count: int, width: int) -> Struct:
    return Struct(f"{width}s" * count)
