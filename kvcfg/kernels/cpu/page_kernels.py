"""What the kernels of `pages/` have in common as Python calls them: one struct by address, and layouts as structs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from torch import Tensor

from kvcfg.kernels.cpu.loader import load_kernel

N_KV_HEADS, TURNED, KEY_DIM, VALUE_DIM = 1, 3, 5, 16
"""Places in a page layout given as ints."""


@cache
def page_kernel(name: str) -> Callable[[bytes], int] | None:
    """The function `kvcfg_<name>`, which takes its call as a packed struct; None if it cannot be had here."""
    library = load_kernel("pages")
    function = None if library is None else getattr(library, f"kvcfg_{name}", None)
    if function is not None:
        function.restype, function.argtypes = ctypes.c_int, (ctypes.c_char_p,)
    return function


@cache
def layout_address(layout: tuple[int, ...]) -> int:
    """Where a layout lies as a struct of int64; it stays there."""
    return ctypes.addressof(_struct(layout))


@cache
def _struct(layout: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(layout))(*layout)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 without one."""
    return 0 if tensor is None else tensor.data_ptr()
