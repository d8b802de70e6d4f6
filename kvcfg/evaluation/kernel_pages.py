"""Pages full of random tokens, in more layers than caches hold, and the steps that read and write them.

Every call of a kernel meets the next layer, as in a model. Layers repeat each other, and the pages of a layer some that
their codec wrote; page ids are in random order, as in a pool that has served for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.closing_step import closing_step
from kvcfg.cache.step import GroupStep, whole_spans
from kvcfg.cache.storage import KeysValues, PagedStorage
from kvcfg.cache.view import LayerView
from kvcfg.config.recipes import needs_calibration
from kvcfg.evaluation.kernel_shapes import KernelShape
from kvcfg.evaluation.memory_reader import cold_bytes
from kvcfg.formats.codec import Calibrated, LayerCalibration
from kvcfg.params import KVCacheParams, table_columns
from kvcfg.units import ceil_div

_SAMPLE_TOKENS = 4096
_MOST_LAYERS = 256
_LARGEST_NUMBER = 5.0
"""Few normal numbers are larger: what calibrated scales are made for."""

_CPU = (torch.device("cpu"),)


class KernelPages:
    """The pages of a batch whose sequences all have `context` tokens.

    Args:
        shape: the layer.
        batch_size: sequences.
        context: tokens of each; a page that closes stays open while it is the last.

    Attributes:
        storage: the pages of all layers.
        num_layers: layers that are cycled through.
        tables: int32 `[batch_size, columns]`.
    """

    def __init__(self, shape: KernelShape, batch_size: int, context: int) -> None:
        self.shape, self.batch_size, self.context = shape, batch_size, context
        pages_each = ceil_div(context, shape.params.page_size)
        num_pages = batch_size * pages_each
        layer_bytes = num_pages * shape.params.bytes_per_layer_page
        self.num_layers = max(2, min(_MOST_LAYERS, ceil_div(cold_bytes(), layer_bytes)))
        self._generator = torch.Generator().manual_seed(0)
        self.storage = self._filled(replace(shape.params, num_layers=self.num_layers), num_pages)
        ids = torch.randperm(num_pages, generator=self._generator, dtype=torch.int32)
        self.tables = torch.zeros(batch_size, table_columns(pages_each), dtype=torch.int32)
        self.tables[:, :pages_each] = ids.view(batch_size, pages_each)
        self.pages = self.tables[:, :pages_each].long()

    @property
    def closed_tokens(self) -> int:
        """Tokens of a sequence that are read from closed pages."""
        size = self.shape.params.page_size
        return (self.context - 1) // size * size if isinstance(self.storage, ClosingStorage) else self.context

    @property
    def sequence_bytes(self) -> float:
        """Bytes that one layer stores of a sequence: what attention reads."""
        group = self.shape.params
        nbytes = self.closed_tokens * group.bytes_per_layer_page / group.page_size
        if self.closed_tokens < self.context:
            opened = group.open_pages
            nbytes += (self.context - self.closed_tokens) * opened.bytes_per_layer_page / opened.page_size
        return nbytes

    def step(self, num_sequences: int, num_tokens: int) -> GroupStep:
        """A step in which each of the first sequences gets its last tokens, as attention sees it.

        Args:
            num_sequences: of the batch.
            num_tokens: of each; where pages close, no more than its last page has.
        """
        size, start = self.shape.params.page_size, self.context - num_tokens
        starts, counts = [start] * num_sequences, [num_tokens] * num_sequences
        if isinstance(self.storage, ClosingStorage):
            return closing_step(
                self.pages[:num_sequences],
                range(num_sequences),
                starts,
                counts,
                [self.closed_tokens // size] * num_sequences,
                page_size=size,
                ring_pages=self.storage.ring_pages,
                horizon=0,
            )
        nothing = torch.empty(0, dtype=torch.int64)  # what a step stores, and gathers, is not asked of this one
        return GroupStep(nothing, (), whole_spans(counts), nothing, None)

    def views(self, step: GroupStep) -> list[LayerView]:
        """What attention sees of the step, layer by layer."""
        tables = self.tables[: len(step.fresh)]
        layers = range(self.num_layers)
        return [self.storage.view(layer, step, tables, value_dim=self.shape.value_dim) for layer in layers]

    def layers(self) -> Iterator[int]:
        """Layer after layer, without end."""
        return cycle(range(self.num_layers))

    def slots(self, num_sequences: int, num_tokens: int) -> list[Tensor]:
        """Where new tokens can go: `[num_sequences * num_tokens]` slots of the storage that holds the newest.

        Args:
            num_sequences: one, or all of the batch.
            num_tokens: tokens of each that stand together.
        """
        size = self.shape.params.page_size
        if isinstance(self.storage, ClosingStorage):
            places = torch.arange(self.storage.opened.num_pages * size).view(self.batch_size, -1)
        else:
            positions = torch.arange(self.context)
            places = self.pages[:, positions // size] * size + positions % size
        windows = places.unfold(1, num_tokens, num_tokens).unflatten(0, (-1, num_sequences))
        return list(windows.transpose(1, 2).flatten(0, 1).flatten(1).contiguous())

    def tokens(self, *size: int, dtype: torch.dtype | None = None) -> KeysValues:
        """Random keys and values `[*size, n_kv_heads, dim]`, in the type that the model computes in by default."""
        group = self.shape.params
        kind = self.shape.dtype.to_torch() if dtype is None else dtype
        widths = (group.head_dim, group.value_dim)
        sides = [torch.randn(*size, group.n_kv_heads, dim, generator=self._generator).to(kind) for dim in widths]
        return KeysValues(*sides)

    def queries(self, count: int) -> Tensor:
        """Random queries `[count, n_q_heads, head_dim]`."""
        size = (count, self.shape.n_q_heads, self.shape.params.head_dim)
        return torch.randn(size, generator=self._generator).to(self.shape.dtype.to_torch())

    def _filled(self, params: KVCacheParams, num_pages: int) -> PagedStorage:
        closes, size = params.closes_pages, params.page_size
        made_up = [self._calibration()] * params.num_layers if needs_calibration(params.storage) else None
        storage = (
            ClosingStorage(params, num_pages, self.batch_size, _CPU, made_up)
            if closes
            else PagedStorage(params, num_pages, _CPU, made_up)
        )
        count = min(num_pages, ceil_div(_SAMPLE_TOKENS, size))
        states = self.tokens(*((count, size) if closes else (count * size,)), dtype=torch.float32)
        storage.store(0, storage.encode(0, *states), torch.arange(count if closes else count * size))
        _repeat(storage, count)
        if isinstance(storage, ClosingStorage):
            opened = storage.opened
            slots = torch.arange(opened.num_pages * size)
            opened.store(0, opened.encode(0, *self.tokens(len(slots), dtype=torch.float32)), slots)
            _repeat(opened, opened.num_pages)
        return storage

    def _calibration(self) -> LayerCalibration:
        """What suits random numbers: any rotation, and scales that cut few of them off."""
        heads, dim = self.shape.params.n_kv_heads, self.shape.params.head_dim
        turns = torch.linalg.qr(torch.randn(heads, dim, dim, generator=self._generator)).Q
        amax = torch.full((heads,), _LARGEST_NUMBER)
        return LayerCalibration(Calibrated(turns, amax), Calibrated(None, amax))


def _repeat(storage: PagedStorage, count: int) -> None:
    """Fill all pages of all layers with the first `count` of the first layer."""
    arena = storage.shards[0].arena
    first = arena[0]
    for start in range(count, storage.num_pages, count):
        first[start : min(start + count, storage.num_pages)] = first[: min(count, storage.num_pages - start)]
    arena[1:] = first
