"""vLLM's blocks on the CPU, read and written as its own attention backend does; vLLM is imported by who makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

import torch
from torch import Tensor

from kvcfg.attention.reach import Reach


class VllmBlocks:
    """One layer's blocks `[num_pages, n_kv_heads, 2 * page_size, head_dim]`, keys before values.

    Args:
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        head_dim: numbers of a key, and of a value.
        page_size: tokens of a block.
        memory: uint8 that the blocks lie in, as many as fit.
        cache_dtype: what vLLM calls the format of the blocks.
        stored: what holds one number of them.
    """

    def __init__(
        self,
        n_q_heads: int,
        n_kv_heads: int,
        head_dim: int,
        page_size: int,
        memory: Tensor,
        cache_dtype: str = "auto",
        stored: torch.dtype = torch.bfloat16,
    ) -> None:
        self._ops = import_module("vllm._custom_ops")
        backend = import_module("vllm.v1.attention.backends.cpu_attn")
        self.n_q_heads, self.n_kv_heads, self.head_dim = n_q_heads, n_kv_heads, head_dim
        self.page_size, self._cache_dtype = page_size, cache_dtype
        self._isa = backend._get_attn_isa(torch.bfloat16, page_size, head_dim, cache_dtype)
        row = (n_kv_heads, 2 * page_size, head_dim)
        self.page_bytes = row[0] * row[1] * row[2] * stored.itemsize
        self.num_pages = memory.numel() // self.page_bytes
        blocks = memory[: self.num_pages * self.page_bytes].view(stored).view(self.num_pages, *row)
        self._keys, self._values = blocks.chunk(2, dim=2)

    def writer(self, slots: Iterator[Tensor], keys: Tensor, values: Tensor) -> Callable[[], None]:
        """Stores tokens `[num_tokens, n_kv_heads, head_dim]` bfloat16 at the next slots."""
        write, isa, cache_dtype = self._ops.cpu_attn_reshape_and_cache, self._isa, self._cache_dtype
        return lambda: write(keys, values, self._keys, self._values, next(slots), isa, kv_cache_dtype=cache_dtype)

    def reader(self, tables: Iterator[Tensor], queries: Tensor, reach: Reach) -> Callable[[], Tensor]:
        """Attends over the next block table; its plan of the work is made once, as for all layers of a step."""
        output, scale = torch.empty_like(queries), self.head_dim**-0.5
        lengths = reach.stop[reach.query_starts[1:].long() - 1]
        plan = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.n_q_heads,
            num_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=queries.dtype,
            query_start_loc=reach.query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=True,
            kv_cache_dtype=self._cache_dtype,
        )

        def read() -> Tensor:
            self._ops.cpu_attention_with_kv_cache(
                query=queries,
                key_cache=self._keys,
                value_cache=self._values,
                output=output,
                query_start_loc=reach.query_starts,
                seq_lens=lengths,
                scale=scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=next(tables),
                softcap=0.0,
                scheduler_metadata=plan,
                s_aux=None,
                kv_cache_dtype=self._cache_dtype,
            )
            return output

        return read
