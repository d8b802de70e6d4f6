"""vLLM's CPU attention on the same heads, where it is installed, over bfloat16 blocks.

What it computes is compared with torch's attention before it is timed. A version that is called otherwise, or heads
that it does not know, leave it out with a notice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcfg.attention import causal
from kvcfg.evaluation.kernel_cases import APPEND, DECODE, PREFILL, KernelCase, distance
from kvcfg.evaluation.kernel_shapes import KernelShape
from kvcfg.evaluation.vllm_blocks import VllmBlocks
from kvcfg.units import ceil_div

_log = logging.getLogger("kvcfg")

BLOCK_SIZES = (32, 128)
"""Tokens of its blocks; the faster ones count."""

LARGEST_ERROR = 2e-2
"""Relative L2 error that is let pass: it multiplies in bfloat16 too."""

_MOST_PLACES = 64


@cache
def vllm_version() -> str | None:
    """The version of vLLM, if it is installed."""
    if find_spec("vllm") is None:
        return None
    names = packages_distributions().get("vllm")
    return version(names[0]) if names else "of no version"


def vllm_calls(shape: KernelShape, case: KernelCase, memory: Tensor) -> list[Callable[[], object]]:
    """The same work by vLLM, once for each size of blocks; empty where it has none of the kind.

    Args:
        shape: the layer.
        case: what is timed.
        memory: uint8, for its blocks; of normal numbers if it is read as bfloat16.
    """
    if case.kernel not in (DECODE, PREFILL, APPEND) or not _agrees(shape):
        return []
    make = _writer if case.kernel == APPEND else _reader
    return [make(_blocks(shape, size, memory), case) for size in BLOCK_SIZES]


def _blocks(shape: KernelShape, block_size: int, memory: Tensor) -> VllmBlocks:
    group = shape.params
    return VllmBlocks(shape.n_q_heads, group.n_kv_heads, group.head_dim, block_size, memory)


def _reader(blocks: VllmBlocks, case: KernelCase) -> Callable[[], object]:
    assert case.context is not None
    start, each = case.context - case.new_tokens, ceil_div(case.context, blocks.page_size)
    reach = causal([start] * case.batch_size, [case.new_tokens] * case.batch_size)
    size = (case.batch_size * case.new_tokens, blocks.n_q_heads, blocks.head_dim)
    ids = _random_blocks(blocks, case.batch_size * each)
    tables = [item.view(case.batch_size, each) for item in ids]
    return blocks.reader(cycle(tables), _numbers(*size), reach)


def _writer(blocks: VllmBlocks, case: KernelCase) -> Callable[[], object]:
    each = ceil_div(case.new_tokens, blocks.page_size)
    offsets = torch.arange(case.new_tokens)
    slots = []
    for ids in _random_blocks(blocks, case.batch_size * each)[:_MOST_PLACES]:
        own = ids.long().view(case.batch_size, each)[:, offsets // blocks.page_size]
        slots.append((own * blocks.page_size + offsets % blocks.page_size).flatten())
    keys, values = _numbers(2, case.batch_size * case.new_tokens, blocks.n_kv_heads, blocks.head_dim).unbind()
    return blocks.writer(cycle(slots), keys, values)


def _random_blocks(blocks: VllmBlocks, count: int) -> list[Tensor]:
    """So many blocks for call after call: none comes again before all others did."""
    ids = torch.randperm(blocks.num_pages, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    calls = max(1, len(ids) // count)
    return list(ids.repeat(ceil_div(calls * count, len(ids)))[: calls * count].view(calls, count).unbind())


def _numbers(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2)).bfloat16()


@cache
def _agrees(shape: KernelShape) -> bool:
    """Whether vLLM has code for these heads, and computes attention when it is called so."""
    if vllm_version() is None:
        return False
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else it greets on stdout, which carries results
    if shape.params.is_mla or shape.params.value_dim != shape.params.head_dim:
        reason = "its CPU attention has no latents, and values as wide as keys"
    else:
        try:
            error = max(_error(shape, size) for size in BLOCK_SIZES)
            reason = "" if error <= LARGEST_ERROR else f"its attention is off by {error:.1e}"
        except Exception as failure:  # of another version, or another build: whatever that raises
            reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    if reason:
        _log.warning("vLLM %s is left out for heads %s: %s", vllm_version(), shape, reason)
    return not reason


def _error(shape: KernelShape, block_size: int) -> float:
    """Relative L2 distance to torch's attention in float64: one query over some tokens, written and read."""
    count, group = 2 * block_size + 5, shape.params
    used = ceil_div(count, block_size)
    memory = torch.zeros(used * block_size * group.n_kv_heads * group.head_dim * 4, dtype=torch.uint8)
    blocks = _blocks(shape, block_size, memory)
    ids = torch.arange(used - 1, -1, -1)
    positions = torch.arange(count)
    keys, values = _numbers(2, count, group.n_kv_heads, group.head_dim).unbind()
    slots = ids[positions // block_size] * block_size + positions % block_size
    blocks.writer(cycle([slots]), keys, values)()
    queries = _numbers(1, shape.n_q_heads, group.head_dim)
    table = ids.to(torch.int32).unsqueeze(0)
    found = blocks.reader(cycle([table]), queries, causal([count - 1], [1]))()
    query, key, value = (item.double().transpose(0, 1).unsqueeze(0) for item in (queries, keys, values))
    exact = scaled_dot_product_attention(query, key, value, enable_gqa=True)[0].transpose(0, 1)
    return distance(found, exact)
