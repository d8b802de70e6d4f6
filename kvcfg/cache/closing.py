"""Storage of a layer group whose pages close: full pages in their recipe, those being filled in a finer one.

Pages of low bits, and scales that tokens share, need a page as a whole, and the newest tokens lose most where bits
are few. So a token is stored in an open page first; when its page is full and no token in it can be taken back, the
page is encoded once, from what the open page holds, and never again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcfg.cache.closing_step import Closing, ClosingStep
from kvcfg.cache.step import GroupStep, Span
from kvcfg.cache.storage import EncodedTokens, PagedStorage, Part
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
        self._planned: tuple[ClosingStep | None, Tensor, Tensor] = (None, torch.empty(0), torch.empty(0))
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

    def write(self, layer: int, step: GroupStep, keys: Tensor, values: Tensor) -> None:
        """Store a step's tokens and close what is full."""
        if _closing(step).closing or not self.opened.put(layer, keys, values, step.slots, step.stored):
            self.keep(layer, step, self.opened.encode(layer, keys, values))

    def keep(self, layer: int, step: GroupStep, encoded: Sequence[EncodedTokens]) -> None:
        """Store a step's tokens, which open pages' codecs have encoded, and close what is full."""
        step = _closing(step)
        ready = [item for item in step.closing if self._closed[layer][item.row] < item.end]
        if ready:
            pages, places = self._places(step, ready)
            self._encode(layer, pages, places, encoded)
            for item in ready:
                self._closed[layer][item.row] = item.end
        self.opened.keep(layer, step, encoded)

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

    def copy_open(self, tokens: Tensor, row: int, origin: ClosingStorage, origin_row: int) -> None:
        """Copy open tokens at some positions `[n]` int64 of a row from another storage of the same group."""
        size = self.params.page_size
        slots, sources = (
            place * storage.ring_pages * size + tokens % (storage.ring_pages * size)
            for storage, place in ((self, row), (origin, origin_row))
        )
        for layer in range(self.params.num_layers):
            self.opened.store(layer, [shard.pick(layer, sources) for shard in origin.opened.shards], slots)

    def close(self, row: int, pages: Sequence[int | None]) -> None:
        """Close a sequence's first pages in every layer, where they are not; None stands for one that is whole."""
        size = self.params.page_size
        for layer, closed in enumerate(self._closed):
            for place in range(closed[row], len(pages)):
                page = pages[place]
                if page is not None:
                    tokens = torch.arange(place * size, (place + 1) * size) % (self.ring_pages * size)
                    self._encode(layer, torch.tensor([page]), row * self.ring_pages * size + tokens)
            closed[row] = max(closed[row], len(pages))

    def _places(self, step: ClosingStep, ready: Sequence[Closing]) -> tuple[Tensor, Tensor]:
        """Pages that close, and where each of their tokens is: its open slot, or -1 - its number in the step.

        All layers of a step ask the same, one after the other.
        """
        if self._planned[0] is not step or len(ready) < len(step.closing):
            places = list[Tensor]()
            for number, _, _, pages in ready:
                first, start = _offset(step.opened, number), _offset(step.fresh, number)
                old = step.open_slots[first : first + step.opened[number].length]
                new = -1 - torch.arange(start, start + step.fresh[number].length)
                places.append(torch.cat([old, new])[: len(pages) * self.params.page_size])
            self._planned = step, torch.cat([item.pages for item in ready]), torch.cat(places)
        return self._planned[1:]

    def _encode(self, layer: int, pages: Tensor, places: Tensor, fresh: Sequence[EncodedTokens] | None = None) -> None:
        """Encode whole pages from their tokens as open pages hold them, or are to hold them."""
        new_tokens: Sequence[EncodedTokens | None] = fresh or [None] * len(self.shards)
        shards = zip(self.shards, self.opened.shards, new_tokens, strict=True)
        if all([shard.close(layer, pages, places, opened, tokens) for shard, opened, tokens in shards]):
            return
        keys, values = self.opened.read_slots(layer, places.clamp(min=0), torch.float32)
        if fresh is not None:
            new, states = places < 0, self.opened.decode(layer, fresh, torch.float32)
            keys[new], values[new] = (item[-1 - places[new]] for item in states)
        shape = (len(pages), self.params.page_size)
        encoded = self.encode(layer, keys.unflatten(0, shape), values.unflatten(0, shape))
        self.store(layer, encoded, pages)


def _offset(spans: Sequence[Span], number: int) -> int:
    """Where the tokens of a sequence begin."""
    return sum(span.num_rows for span in spans[:number])


def _closing(step: GroupStep) -> ClosingStep:
    assert isinstance(step, ClosingStep)
    return step
