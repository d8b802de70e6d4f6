"""The compiled hash chain: names of all pages of a prompt in one call, from token ids in one more."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import cache, lru_cache
from struct import Struct
from typing import Any

from kvcfg.kernels.cpu.loader import load_kernel

HashChain = Callable[[bytes, "array[int]", int, int, int], list[bytes]]
"""(parent name, ids, page size, first page, number of pages) -> names."""

NAME_BYTES = {"sha256": 32, "xxh3_128": 16}
"""Algorithms that are compiled, and how long their names are."""

_size, _pointer, _bytes, _int = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int


def compiled_chain(algorithm: str, *, plain: bool = False) -> HashChain | None:
    """The chain of an algorithm; None if it is not compiled here.

    Args:
        algorithm: a name in `NAME_BYTES`, or one that is not compiled.
        plain: whether SHA-256 does without the CPU's own instructions.
    """
    if algorithm not in NAME_BYTES:
        return None
    width = NAME_BYTES[algorithm]
    function = _function(f"kvcfg_{algorithm}_chain", None, _bytes, _pointer, _size, _size, _pointer, _int)
    if function is None:
        return None

    def chain(parent: bytes, ids: array[int], page_size: int, first: int, count: int) -> list[bytes]:
        if len(parent) != width or (first + count) * page_size > len(ids):
            raise ValueError(f"{count} pages from page {first} do not follow from {len(parent)} bytes, {len(ids)} ids")
        page_bytes = page_size * ids.itemsize
        names = array("B", bytes(count * width))
        start = ids.buffer_info()[0] + first * page_bytes
        function(parent, start, page_bytes, count, names.buffer_info()[0], plain)
        return list(_names(count, width).unpack(names))

    return chain


def narrowed(wide: bytes) -> array[int] | None:
    """Native int64 as int32; None if it is not compiled here, or a number does not fit."""
    function = _function("kvcfg_narrow", _int, _bytes, _size, _pointer)
    ids = array("i", bytes(len(wide) // 2))
    return ids if function is not None and function(wide, len(ids), ids.buffer_info()[0]) else None


@cache
def _function(name: str, result: Any, *arguments: Any) -> Callable[..., int] | None:
    library = load_kernel("hash_chain")
    if library is None:
        return None
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _names(count: int, width: int) -> Struct:
    return Struct(f"{width}s" * count)
