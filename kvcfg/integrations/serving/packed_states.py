"""Keys and values of a packed step, on their way from the cache to the attention `kvcfg`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kvcfg.attention import attend
from kvcfg.attention.reference import attend as attend_by_torch
from kvcfg.cache.packed import Packed
from kvcfg.cache.storage import KeysValues
from kvcfg.cache.view import LayerView
from kvcfg.errors import ShapeError
from kvcfg.integrations.lazy_tensors import LazyTensor
from kvcfg.integrations.serving.packed_batch import PackedBatch
from kvcfg.params import KVCacheParams


class GatheredTokens:
    """What a step's queries see of a layer, gathered, where it cannot be read from the pages.

    Args:
        packed: per sequence its past, then its new tokens.
        firsts: per sequence, the position of the first of them.
        batch: the step.
    """

    def __init__(self, packed: Packed, firsts: Sequence[int], batch: PackedBatch) -> None:
        self._packed, self._firsts = packed, firsts
        self._offsets = [0, *accumulate(packed.lengths)]
        self._sequence_of = batch.sequence_of.tolist() if batch.alone else range(len(firsts))

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self._packed.values.shape[-1]

    def tokens(self, sequence: int, first: int, stop: int, dtype: torch.dtype) -> KeysValues:
        """Tokens `[first, stop)` of a sequence, as `LayerView.tokens`."""
        number = self._sequence_of[sequence]
        begin = self._offsets[number] + first - self._firsts[number]
        seen = slice(begin, begin + stop - first)
        return KeysValues(self._packed.keys[seen].to(dtype), self._packed.values[seen].to(dtype))


class PackedStates(LazyTensor):
    """Keys or values `[1, n_kv_heads, num_rows, dim]` of a packed step, which know where all that is seen lies."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        source: LayerView | GatheredTokens,
        batch: PackedBatch,
        group: KVCacheParams,
    ) -> None:
        self._source, self._batch, self._group = source, batch, group

    def read(self) -> Tensor:
        """Refused: sequences of different lengths are no plain tensor."""
        raise ShapeError(
            "only the attention kvcfg reads a packed batch, and this layer does something else with its keys and "
            "values; give its model's requests to generate() one by one"
        )

    def attended(self, query: Tensor, settings: dict[str, Any]) -> Tensor:
        """Attention of the step's queries.

        Args:
            query: `[1, n_q_heads, num_rows, head_dim]`.
            settings: scaling, softcap, sliding_window, s_aux as layers pass them.

        Returns:
            `[1, num_rows, n_q_heads, value_dim]`; 0 in rows after the step's tokens.

        Raises:
            ShapeError: if the layer adds a bias to its scores, or sees what comes after a token.
        """
        if settings.get("position_bias") is not None or settings.get("is_causal") is False:
            raise ShapeError("a packed batch is read by causal attention without a bias; this layer asks for another")
        batch, source, group = self._batch, self._source, self._group
        window = settings.get("sliding_window") or group.window
        scale = settings.get("scaling")
        what = {
            "scale": query.shape[3] ** -0.5 if scale is None else scale,
            "softcap": settings.get("softcap"),
            "sinks": settings.get("s_aux"),
        }
        queries = query[0, :, : batch.num_tokens].transpose(0, 1)
        reach = batch.reach(window, chunked=group.kind == "chunked")
        if isinstance(source, GatheredTokens):
            output = attend_by_torch(queries, source, reach, **what)
        elif batch.alone:
            with _one_thread():
                output = attend(queries, source, reach, **what)
        else:
            output = attend(queries, source, reach, **what)
        if query.shape[2] > batch.num_tokens:
            padding = output.new_zeros((query.shape[2] - batch.num_tokens, *output.shape[1:]))
            output = torch.cat([output, padding])
        return output[None]


@contextmanager
def _one_thread() -> Iterator[None]:
    """With several threads the kernel cuts a long context by how much there is to do in all."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
