"""Storage of a layer group whose pages close: full pages in their recipe, those being filled in a finer one.

Pages of low bits, and scales that tokens share, need a page as a whole, and the newest tokens lose most where bits
are few. So a token is stored in an open page first; when its page is full and no token in it can be taken back, the
page is encoded once, from what the open page holds, and never again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcfg.cache.closing_step import ClosingStep
from kvcfg.cache.step import GroupStep, Span
from kvcfg.cache.storage import EncodedTokens, KeysValues, PagedStorage, Part
from kvcfg.formats.codec import LayerCalibration
from kvcfg.params import KVCacheParams


class ClosingStorage(PagedStorage):
    """Closed pages of one layer group, and the open pages of its sequences, on the shards of one replica.

    Args:
        params: what a closed page holds; `params.open_pages` is what an open one holds.
        num_pages: pages that can be handed out; one more is allocated, the null page.
        max_batch_size: sequences held at the same time; each has `params.open_pages_per_sequence` open pages.
        devices: one device per tensor parallel shard.
        calibrated: what was measured beforehand, layer by layer; None = nothing.
    """

    def __init__(
        self,
        params: KVCacheParams,
        num_pages: int,
        max_batch_size: int,
        devices: Sequence[torch.device],
        calibrated: Sequence[LayerCalibration] | None = None,
    ) -> None:
        super().__init__(params, num_pages, devices, calibrated)
        self.ring_pages = params.open_pages_per_sequence
        self.opened = PagedStorage(params.open_pages, max_batch_size * self.ring_pages, devices)
        self._closed = [[0] * max_batch_size for _ in range(params.num_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of closed and open pages on all shards, null pages included."""
        return super().nbytes + self.opened.nbytes

    @property
    def newest(self) -> PagedStorage:
        """Open pages: a closed one is made of them."""
        return self.opened

    def past(self, layer: int, step: GroupStep, dtype: torch.dtype) -> list[Part]:
        """What a step's queries see of the tokens before it: closed pages, then open ones."""
        step = _closing(step)
        opened = Part(self.opened.read_slots(layer, step.open_slots, dtype), step.opened)
        return [*super().past(layer, step, dtype), opened]

    def write(self, layer: int, step: GroupStep, keys: Tensor, values: Tensor) -> list[EncodedTokens]:
        """Store a step's tokens and close what is full; returns the tokens as open pages store them."""
        step = _closing(step)
        encoded = self.opened.encode(layer, keys, values)
        if step.closing:
            self._close(layer, step, encoded)
        kept = encoded if step.stored is None else [tokens.at(step.stored) for tokens in encoded]
        self.opened.store(layer, kept, step.slots)
        return encoded

    def begin(self, row: int, num_closed: int) -> None:
        """A row belongs to a sequence of which so many pages are closed already, found or copied."""
        for layer in self._closed:
            layer[row] = num_closed

    def fork(self, source: int, target: int) -> None:
        """Copy the open pages of one row to another."""
        pages = torch.arange(self.ring_pages)
        self.opened.copy_pages(source * self.ring_pages + pages, target * self.ring_pages + pages)
        for layer in self._closed:
            layer[target] = layer[source]

    def close(self, row: int, pages: Sequence[int | None]) -> None:
        """Close a sequence's first pages in every layer, where they are not; None stands for one that is whole."""
        size = self.params.page_size
        for layer, closed in enumerate(self._closed):
            for place in range(closed[row], len(pages)):
                page = pages[place]
                if page is not None:
                    tokens = torch.arange(place * size, (place + 1) * size) % (self.ring_pages * size)
                    states = self.opened.read_slots(layer, row * self.ring_pages * size + tokens, torch.float32)
                    self._encode(layer, torch.tensor([page]), states)
            closed[row] = max(closed[row], len(pages))

    def _close(self, layer: int, step: ClosingStep, encoded: Sequence[EncodedTokens]) -> None:
        """Encode the pages that are full, from their tokens as open pages hold them."""
        before = self.opened.read_slots(layer, step.open_slots, torch.float32)
        fresh = self.opened.decode(layer, encoded, torch.float32)
        for number, row, end, pages in step.closing:
            if self._closed[layer][row] >= end:
                continue
            first, start = _offset(step.opened, number), _offset(step.fresh, number)
            old = slice(first, first + step.opened[number].length)
            new = slice(start, start + step.fresh[number].length)
            states = KeysValues(
                torch.cat([before.keys[old], fresh.keys[new]]), torch.cat([before.values[old], fresh.values[new]])
            )
            self._encode(layer, pages, states)
            self._closed[layer][row] = end

    def _encode(self, layer: int, pages: Tensor, states: KeysValues) -> None:
        """Store the first tokens of `states` as these pages."""
        shape = (len(pages), self.params.page_size)
        count = len(pages) * self.params.page_size
        keys, values = (item[:count].unflatten(0, shape) for item in states)
        self.store(layer, self.encode(layer, keys, values), pages)


def _offset(spans: Sequence[Span], number: int) -> int:
    """Where the tokens of a sequence begin."""
    return sum(span.num_rows for span in spans[:number])


def _closing(step: GroupStep) -> ClosingStep:
    assert isinstance(step, ClosingStep)
    return step
