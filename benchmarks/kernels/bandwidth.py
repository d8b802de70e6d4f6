"""Variants that do nothing but read: the bandwidth that the same rounds had."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from rounds import Variant
from torch import Tensor

READ_BYTES = 512 << 20


def readers(memory: Tensor, threads: int) -> list[Variant]:
    """Two readers of the first 512 MB of `memory`, in order; the faster one counts.

    Args:
        memory: uint8, contiguous.
        threads: on how many threads.
    """
    held = memory.flatten()[:READ_BYTES]
    words, library = held.view(torch.float32), _library()
    address, count = ctypes.c_void_p(held.data_ptr()), ctypes.c_int64(held.numel())
    return [
        Variant("read", "C++", lambda: library.read_in_order(address, count, ctypes.c_int64(threads)), held.numel()),
        Variant("read", "torch", words.sum, held.numel()),
    ]


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        source = Path(__file__).with_name("read.cpp")
        command = ["g++", "-O3", "-march=native", "-w", "-pthread", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_in_order.restype = ctypes.c_uint64
    return loaded
