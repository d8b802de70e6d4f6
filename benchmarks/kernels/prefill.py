"""Prefill: causal attention of many new tokens, over themselves and over what was cached before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import side_kvcfg
import side_vllm
import torch
from checks import Check, bound_of
from reference import attention
from rounds import Variant
from shapes import NEW_TOKENS, PROMPT, Shape
from torch import Tensor

from kvcfg.attention.reach import Reach, causal
from kvcfg.evaluation.kernel_cases import distance
from kvcfg.params import table_columns

SPANS = ((0, PROMPT), (PROMPT, NEW_TOKENS))
"""Tokens in the cache before, and new ones."""

_CHECKED = 64


class _Case(NamedTuple):
    """One variant, and what its output is compared with."""

    variant: Variant
    keys: Tensor
    values: Tensor
    read: Callable[[], Tensor]
    queries: Tensor


def cases(shape: Shape, past: int, count: int, formats: list[str], sizes: list[int], vllm: bool) -> Iterator[_Case]:
    """All variants: the whole context is in the cache, as it is once the new tokens were appended."""
    reach = causal([past], [count])
    length = past + count
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(count, shape.n_q_heads, shape.head_dim, generator=generator)
    keys, values = torch.randn(2, length, shape.n_kv_heads, shape.head_dim, generator=generator).unbind()
    for name in formats:
        for page_size in sizes:
            yield _kvcfg(shape, name, page_size, queries, keys, values, reach)
    if vllm:
        for name, sizes in side_vllm.BLOCK_SIZES.items():
            for size in sizes:
                yield _vllm(shape, name, size, queries.bfloat16(), keys, values, reach)
    if not past:
        yield _sdpa(shape, queries, keys, values)


def checks(shape: Shape, formats: list[str], page_sizes: list[int], with_vllm: bool) -> Iterator[Check]:
    """Some queries of what will be timed, against float64."""
    for past, count in SPANS:
        rows = torch.linspace(0, count - 1, _CHECKED).long()
        stops = (rows + past + 1).tolist()
        for case in cases(shape, past, count, formats, page_sizes, with_vllm):
            side, name, size = case.variant.side, case.variant.format, case.variant.page_size
            if size is not None:
                wanted = attention(case.queries[rows], case.keys, case.values, stops, shape)
                error = distance(case.read()[rows], wanted)
                yield Check("prefill", side, name, size, str(shape), error, bound_of(side, name))


def measure(
    shape: Shape,
    formats: list[str],
    page_sizes: list[int],
    with_vllm: bool,
    timed: Callable[[dict[str, Any], list[Variant], Tensor | None], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """All rows of a shape."""
    rows = []
    for past, count in SPANS:
        variants = [case.variant for case in cases(shape, past, count, formats, page_sizes, with_vllm)]
        rows += timed({"case": "prefill", "shape": str(shape), "past": past, "tokens": count}, variants, None)
    return rows


def _pages(length: int, page_size: int) -> Tensor:
    return torch.randperm(length // page_size, generator=torch.Generator().manual_seed(7), dtype=torch.int32)


def _kvcfg(
    shape: Shape, name: str, page_size: int, queries: Tensor, keys: Tensor, values: Tensor, reach: Reach
) -> _Case:
    ids = _pages(len(keys), page_size)
    pages = side_kvcfg.Pages(shape, name, page_size, len(ids))
    pages.fill(keys, values)
    table = torch.zeros(1, table_columns(len(ids)), dtype=torch.int32)
    table[0, : len(ids)] = ids
    queries = queries.to(pages.query_type)
    read = pages.reader(pages.layer.arena, cycle([table]), queries, reach)
    variant = Variant("kvcfg", name, read, len(ids) * pages.page_bytes, page_size, "random")
    return _Case(variant, *pages.stored(ids), read, queries)


def _vllm(shape: Shape, name: str, size: int, queries: Tensor, keys: Tensor, values: Tensor, reach: Reach) -> _Case:
    ids = _pages(len(keys), size)
    memory = torch.zeros(len(keys) * shape.n_kv_heads * shape.head_dim * 4, dtype=torch.uint8)
    blocks = side_vllm.blocks_of(shape, name, size, memory)
    # Numbers that its format holds exactly, as in decode.
    exact = torch.float8_e4m3fn if name == "fp8" else torch.bfloat16
    keys, values = (item.to(exact).to(torch.bfloat16) for item in (keys, values))
    slots = (ids.long().unsqueeze(1) * size + torch.arange(size)).flatten()
    blocks.writer(cycle([slots]), keys, values)()
    read = blocks.reader(cycle([ids.unsqueeze(0)]), queries, reach)
    variant = Variant("vllm", name, read, len(ids) * blocks.page_bytes, size, "random")
    return _Case(variant, keys, values, read, queries)


def _sdpa(shape: Shape, queries: Tensor, keys: Tensor, values: Tensor) -> _Case:
    """PyTorch alone, in float32, keys and values where it likes them."""
    heads = [item.transpose(0, 1).unsqueeze(0).contiguous() for item in (queries, keys, values)]

    def read() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    return _Case(Variant("torch", "float32", read, keys.nbytes + values.nbytes), keys, values, read, queries)
