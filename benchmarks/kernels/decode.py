"""Decode: every sequence of a batch has one query over its whole context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import side_kvcfg
import side_vllm
import torch
from checks import Check, check
from memory import noise, page_tables, pages_of
from rounds import Variant
from shapes import ORDERS, Point, Shape
from torch import Tensor

from kvcfg.attention.reach import Reach, causal
from kvcfg.params import table_columns
from kvcfg.units import ceil_div

LENGTHS = (1, 127, 300, 1024)
"""Tokens of the sequences that are checked."""

_SDPA_TOKENS = 1 << 15


def checks(shape: Shape, formats: Iterable[str], page_sizes: Iterable[int], with_vllm: bool) -> Iterator[Check]:
    """Every kernel on a small batch of different lengths, against float64 on what its pages hold."""
    reach = causal([length - 1 for length in LENGTHS], [1] * len(LENGTHS))
    for name in formats:
        for page_size in page_sizes:
            yield _kvcfg_check(shape, name, page_size, reach)
    if with_vllm:
        for name, sizes in side_vllm.BLOCK_SIZES.items():
            for block_size in sizes:
                yield _vllm_check(shape, name, block_size, reach)


def _tables(page_size: int, columns: Callable[[int], int]) -> Tensor:
    """Page tables of the checked sequences over one pool, in random order."""
    needed = [ceil_div(length, page_size) for length in LENGTHS]
    ids = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    tables = torch.zeros(len(needed), columns(max(needed)), dtype=torch.int32)
    for row, own in zip(tables, ids.split(needed), strict=True):
        row[: len(own)] = own
    return tables


def _numbers(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _kvcfg_check(shape: Shape, name: str, page_size: int, reach: Reach) -> Check:
    tables = _tables(page_size, table_columns)
    num_pages = sum(ceil_div(length, page_size) for length in LENGTHS)
    pages = side_kvcfg.Pages(shape, name, page_size, num_pages)
    heads = (num_pages * page_size, shape.n_kv_heads, shape.head_dim)
    pages.fill(_numbers(*heads, seed=2), _numbers(*heads, seed=3))
    queries = _numbers(len(LENGTHS), shape.n_q_heads, shape.head_dim, seed=4).to(pages.query_type)
    found = pages.reader(pages.layer.arena, cycle([tables]), queries, reach)()
    states = []
    for row, length in zip(tables, LENGTHS, strict=True):
        keys, values = pages.stored(row[: ceil_div(length, page_size)])
        states.append((keys[:length], values[:length]))
    return check("decode", "kvcfg", name, page_size, shape, found, queries, states)


def _vllm_check(shape: Shape, name: str, block_size: int, reach: Reach) -> Check:
    tables = _tables(block_size, lambda needed: needed)
    rows = (sum(LENGTHS), shape.n_kv_heads, shape.head_dim)
    # Numbers that its format holds exactly: how it rounds others is not what is checked here.
    exact = torch.float8_e4m3fn if name == "fp8" else torch.bfloat16
    keys, values = (_numbers(*rows, seed=seed).to(exact).to(torch.bfloat16) for seed in (2, 3))
    queries = _numbers(len(LENGTHS), shape.n_q_heads, shape.head_dim, seed=4).bfloat16()
    num_pages = sum(ceil_div(length, block_size) for length in LENGTHS)
    memory = torch.zeros(num_pages * block_size * shape.n_kv_heads * shape.head_dim * 4, dtype=torch.uint8)
    blocks = side_vllm.blocks_of(shape, name, block_size, memory)
    slots = [
        row[torch.arange(length) // block_size].long() * block_size + torch.arange(length) % block_size
        for row, length in zip(tables, LENGTHS, strict=True)
    ]
    blocks.writer(cycle([torch.cat(slots)]), keys, values)()
    found = blocks.reader(cycle([tables]), queries, reach)()
    states = list(zip(keys.split(LENGTHS), values.split(LENGTHS), strict=True))
    return check("decode", "vllm", name, block_size, shape, found, queries, states)


@dataclass(slots=True)
class Pools:
    """Large memory of one shape; what has no scales is the same for both sides and all page sizes."""

    shape: Shape
    with_vllm: bool
    unscaled: dict[str, Tensor] = field(default_factory=dict)
    pages: dict[tuple[str, int], tuple[side_kvcfg.Pages, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape, formats: Iterable[str], page_sizes: Iterable[int], with_vllm: bool) -> Pools:
        """Fill them."""
        pools = cls(shape, with_vllm)
        types = {name: kind for name, kind in side_kvcfg.UNSCALED.items() if name in formats}
        types["bf16"] = torch.bfloat16  # vLLM's too, and read for the bandwidth
        if with_vllm:
            types["fp8"] = torch.float8_e4m3fn
        pools.unscaled = {name: noise(kind) for name, kind in types.items()}
        for name in formats:
            for page_size in page_sizes:
                pages = side_kvcfg.Pages(shape, name, page_size)
                shared = name in side_kvcfg.UNSCALED
                arena = pages_of(pools.unscaled[name], pages.page_bytes) if shared else pages.pool()
                pools.pages[name, page_size] = (pages, arena)
        return pools

    def variants(self, point: Point) -> list[Variant]:
        """All of one point."""
        reach = causal([point.context - 1] * point.batch, [1] * point.batch)
        queries = _numbers(point.batch, self.shape.n_q_heads, self.shape.head_dim, seed=4)
        found = [
            self._kvcfg(name, page_size, order, point, queries, reach)
            for name, page_size in self.pages
            for order in ORDERS
        ]
        if self.with_vllm:
            found += [
                self._vllm(name, size, order, point, queries.bfloat16(), reach)
                for name, sizes in side_vllm.BLOCK_SIZES.items()
                for size in sizes
                for order in ORDERS
            ]
        if point.batch * point.context <= _SDPA_TOKENS and "float32" in self.unscaled:
            found.append(self._sdpa(max(size for _, size in self.pages), point, queries))
        return found

    def _kvcfg(self, name: str, page_size: int, order: str, point: Point, queries: Tensor, reach: Reach) -> Variant:
        pages, arena = self.pages[name, page_size]
        each = point.context // page_size
        tables = page_tables(
            len(arena), point.batch, each, order, columns=table_columns(each), seed=page_size + len(name)
        )
        call = pages.reader(arena, tables, queries.to(pages.query_type), reach)
        return Variant("kvcfg", name, call, point.batch * each * pages.page_bytes, page_size, order)

    def _vllm(self, name: str, block_size: int, order: str, point: Point, queries: Tensor, reach: Reach) -> Variant:
        blocks = side_vllm.blocks_of(self.shape, name, block_size, self.unscaled[name])
        each = point.context // block_size
        tables = page_tables(blocks.num_pages, point.batch, each, order, columns=each, seed=block_size)
        call = blocks.reader(tables, queries, reach)
        return Variant("vllm", name, call, point.batch * each * blocks.page_bytes, block_size, order)

    def _sdpa(self, page_size: int, point: Point, queries: Tensor) -> Variant:
        """PyTorch alone: gathers pages of float32, then scaled_dot_product_attention."""
        shape, each = self.shape, point.context // page_size
        pages = self.unscaled["float32"].view(torch.float32)
        numbers = 2 * page_size * shape.n_kv_heads * shape.head_dim
        pool = pages[: len(pages) // numbers * numbers].view(-1, 2, page_size, shape.n_kv_heads, shape.head_dim)
        tables = page_tables(len(pool), point.batch, each, "random", columns=each, seed=5)

        def call() -> Tensor:
            gathered = pool[next(tables)].permute(2, 0, 4, 1, 3, 5).flatten(3, 4)
            keys, values = gathered.unbind()
            scores = torch.nn.functional.scaled_dot_product_attention
            return scores(queries.unsqueeze(2), keys, values, enable_gqa=True)

        return Variant("torch", "float32", call, point.batch * each * numbers * 4, page_size, "random")


def measure(
    shape: Shape,
    points: Iterable[Point],
    formats: list[str],
    page_sizes: list[int],
    with_vllm: bool,
    timed: Callable[[dict[str, Any], list[Variant], Tensor], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """All rows of a shape; two page sizes at a time, so that the pools of a group fit in memory together."""
    rows = []
    for start in range(0, len(page_sizes), 2):
        group = page_sizes[start : start + 2]
        pools = Pools.of(shape, formats, group, with_vllm)
        for point in points:
            labels = {"case": "decode", "shape": str(shape), **point._asdict()}
            rows += timed(labels, pools.variants(point), pools.unscaled["bf16"])
    return rows
