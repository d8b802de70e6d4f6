"""Memory that is too large for caches, and page tables that walk through all of it."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

POOL_BYTES = 512 << 20
_NOISE_ROWS = 1 << 12


def noise(dtype: torch.dtype, nbytes: int = POOL_BYTES) -> Tensor:
    """Normal numbers of a type, as bytes `[nbytes]`; they repeat after some megabytes."""
    numbers = torch.randn(_NOISE_ROWS, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    return repeated(numbers.view(torch.uint8).view(_NOISE_ROWS, -1), nbytes // (1024 * dtype.itemsize)).flatten()


def repeated(rows: Tensor, count: int) -> Tensor:
    """`count` rows in which `rows` repeat."""
    out = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype)
    for start in range(0, count, len(rows)):
        out[start : start + len(rows)] = rows[: count - start]
    return out


def pages_of(memory: Tensor, page_bytes: int) -> Tensor:
    """Memory cut into pages `[num_pages, page_bytes]`."""
    count = memory.numel() // page_bytes
    return memory[: count * page_bytes].view(count, page_bytes)


def page_tables(num_pages: int, batch: int, pages_each: int, order: str, *, columns: int, seed: int) -> cycle[Tensor]:
    """Page tables for call after call; no page comes again before all others did.

    Args:
        num_pages: pages of the pool.
        batch: sequences of a call.
        pages_each: pages of a sequence.
        order: random, or consecutive pages for a sequence.
        columns: of each table, at least `pages_each`; the rest is 0.
        seed: where consecutive ones begin, or which random order.
    """
    generator = torch.Generator().manual_seed(seed)
    if order == "random":
        ids = torch.randperm(num_pages, generator=generator, dtype=torch.int32)
    else:
        begin = int(torch.randint(num_pages, (1,), generator=generator))
        ids = torch.arange(num_pages, dtype=torch.int32).roll(-begin)
    calls = max(2, num_pages // (batch * pages_each))
    needed = calls * batch * pages_each
    tables = torch.zeros(calls, batch, columns, dtype=torch.int32)
    tables[:, :, :pages_each] = ids.repeat(-(-needed // num_pages))[:needed].view(calls, batch, pages_each)
    return cycle(tables.unbind())
