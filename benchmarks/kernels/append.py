"""Append: a prompt's tokens into whole pages, and one token for each sequence of a decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import side_kvcfg
import side_vllm
import torch
from checks import Check
from memory import POOL_BYTES, pages_of
from rounds import Variant
from shapes import APPENDED, STEP, Shape
from torch import Tensor

from kvcfg.evaluation.kernel_cases import distance

FORMATS = ("bf16", "fp8", "int8")

_CALLS = 64

BOUNDS = {"bf16": 0.0, "fp8": 0.03, "int8": 0.01}
"""Relative L2 errors of rounding normal numbers to nearest: 2.7e-2 in fp8; int8 has 127 levels for 3 deviations."""


def checks(shape: Shape, page_sizes: list[int]) -> Iterator[Check]:
    """What kvcfg stored against what it was given; vLLM's writer is checked by reading what it wrote, in decode."""
    for name in FORMATS:
        for page_size in page_sizes:
            pages = side_kvcfg.Pages(shape, name, page_size)
            keys, values = _tokens(shape, 300)
            slots = torch.randperm(64 * page_size, generator=torch.Generator().manual_seed(3))[: len(keys)]
            pages.writer(pages.layer.arena, cycle([slots]), keys, values)()
            stored = pages.storage.read_slots(0, slots, torch.float32)
            error = max(distance(*pair) for pair in zip(stored, (keys, values), strict=True))
            yield Check("append", "kvcfg", name, page_size, str(shape), error, BOUNDS[name])


def measure(
    shape: Shape,
    page_sizes: list[int],
    with_vllm: bool,
    timed: Callable[[dict[str, Any], list[Variant], Tensor | None], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """All rows of a shape. Both sides write into the same memory, which nobody reads as numbers."""
    memory = torch.zeros(POOL_BYTES, dtype=torch.uint8)
    rows = []
    for batch, count in ((1, APPENDED), (STEP, 1)):
        keys, values = _tokens(shape, batch * count)
        nbytes = keys.nbytes + values.nbytes
        variants = []
        for name in FORMATS:
            for page_size in page_sizes:
                pages = side_kvcfg.Pages(shape, name, page_size)
                arena = pages_of(memory, pages.page_bytes)
                call = pages.writer(arena, _slots(len(arena), page_size, batch, count), keys, values)
                variants.append(Variant("kvcfg", name, call, nbytes, page_size))
        if with_vllm:
            for name, sizes in side_vllm.BLOCK_SIZES.items():
                for size in sizes:
                    blocks = side_vllm.blocks_of(shape, name, size, memory)
                    call = blocks.writer(_slots(blocks.num_pages, size, batch, count), keys, values)
                    variants.append(Variant("vllm", name, call, nbytes, size))
        rows += timed({"case": "append", "shape": str(shape), "batch": batch, "tokens": count}, variants, None)
    return rows


def _tokens(shape: Shape, count: int) -> tuple[Tensor, Tensor]:
    numbers = torch.randn(2, count, shape.n_kv_heads, shape.head_dim, generator=torch.Generator().manual_seed(2))
    keys, values = numbers.bfloat16().unbind()
    return keys, values


def _slots(num_pages: int, page_size: int, batch: int, count: int) -> cycle[Tensor]:
    """Slots for call after call: whole random pages for a prompt, a random slot in a page of its own otherwise."""
    generator = torch.Generator().manual_seed(page_size)
    offsets, found = torch.arange(page_size), []
    for _ in range(_CALLS):
        pages = torch.randperm(num_pages, generator=generator)[: batch if count == 1 else count // page_size]
        if count == 1:
            found.append(pages * page_size + torch.randint(page_size, (batch,), generator=generator))
        else:
            found.append((pages.unsqueeze(1) * page_size + offsets).flatten())
    return cycle(found)
