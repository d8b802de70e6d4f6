"""Memory that no cache holds, and how fast it is read in order: what no reader of pages can be faster than."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

_LEAST_BYTES = 512 << 20
_CACHES = 4
_PATTERN_NUMBERS = 1 << 20


@cache
def cold_bytes() -> int:
    """Bytes that are more than the caches hold, so that what was read that long ago must be read again."""
    try:
        last_level = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):  # a system that does not tell
        last_level = 0
    return max(_LEAST_BYTES, _CACHES * last_level) // 8 * 8


class MemoryReader:
    """Reads memory in order, on as many threads as torch uses.

    Attributes:
        memory: uint8 `[cold_bytes()]`, normal numbers if they are read as bfloat16.
    """

    def __init__(self) -> None:
        count = cold_bytes()
        pattern = torch.randn(_PATTERN_NUMBERS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        pattern = pattern.view(torch.uint8)
        self.memory = torch.empty(count, dtype=torch.uint8)
        for start in range(0, count, len(pattern)):
            self.memory[start : start + len(pattern)] = pattern[: count - start]
        self._words = self.memory.view(torch.int64)

    def __call__(self) -> Tensor:
        """Read all of it: a sum of integers waits for memory alone."""
        return self._words.sum()
