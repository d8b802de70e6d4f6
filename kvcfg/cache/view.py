"""What attention may see of one layer in one step: where its pages lie, and their tokens decoded.

    token t < closed      page t // page_size of the sequence, in column `page % columns` of its page table
    later tokens          slot t % ring of the sequence's open pages, where pages close; else there are none

A view is read once the step's own tokens are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvcfg.cache.closing_step import ClosingStep
from kvcfg.cache.layout import PageLayout
from kvcfg.cache.step import GroupStep
from kvcfg.units import ceil_div

if TYPE_CHECKING:
    from kvcfg.cache.storage import KeysValues, PagedStorage


class LayerPages(NamedTuple):
    """The pages of one layer on one shard, as kernels are told of them.

    Attributes:
        arena: uint8 `[num_pages + 1, page_bytes]`.
        layout: where numbers lie in a page; None if kernels do not read it.
        ints: the layout as a struct of int64; empty without one.
        levels: float32 `[2, 16]`, the numbers of 4-bit codes of keys and of values; None if neither has any.
        head_scales: float32 `[2, n_kv_heads]`, scales that are not stored; None if they are 1.
    """

    arena: Tensor
    layout: PageLayout | None
    ints: tuple[int, ...]
    levels: Tensor | None
    head_scales: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of one shard in one step.

    Attributes:
        storage: the bytes of the layer's group.
        layer: index within the group.
        shard: tensor parallel shard, whose heads are seen.
        tables: int32 `[num_sequences, columns]`, the page tables of the batch.
        step: where the group reads and writes.
        value_dim: numbers of a value; of a latent (MLA) those of its key that are read as value too.
    """

    storage: PagedStorage
    layer: int
    shard: int
    tables: Tensor
    step: GroupStep
    value_dim: int

    @property
    def in_place(self) -> bool:
        """Whether all that the step's queries see is there once its tokens are stored; else it must be read before."""
        return self.step.in_place

    @property
    def pages(self) -> LayerPages:
        """The pages that page tables name."""
        return self.storage.layer_pages(self.layer, self.shard, self.value_dim)

    @property
    def open_pages(self) -> LayerPages | None:
        """Open pages, ring after ring, where pages close; None where they do not."""
        if not isinstance(self.step, ClosingStep):
            return None
        return self.storage.newest.layer_pages(self.layer, self.shard, self.value_dim)

    def tokens(self, sequence: int, first: int, stop: int, dtype: torch.dtype) -> KeysValues:
        """Tokens `[first, stop)` of a sequence, at least one, decoded; of others only closed pages' are read.

        Args:
            sequence: number in the batch.
            first: position of the first token.
            stop: position after the last one.
            dtype: what the numbers are returned in; they are decoded in float32.

        Returns:
            Keys `[num_tokens, n_kv_heads, head_dim]` and values `[num_tokens, n_kv_heads, value_dim]`, the heads of
            the shard.
        """
        closed = stop
        parts: list[KeysValues] = []
        if isinstance(self.step, ClosingStep):
            closed = min(max(int(self.step.closed[sequence]), first), stop)
        if closed > first:
            parts.append(self._from_pages(sequence, first, closed))
        if stop > closed:
            parts.append(self._from_ring(sequence, closed, stop))
        keys, values = (torch.cat(side).to(dtype) for side in zip(*parts, strict=True))
        if self.storage.params.is_mla:
            values = keys[..., : self.value_dim]
        return parts[0]._replace(keys=keys, values=values)

    def _from_pages(self, sequence: int, first: int, stop: int) -> KeysValues:
        size, shard = self.storage.params.page_size, self.storage.shards[self.shard]
        numbers = torch.arange(first // size, ceil_div(stop, size), device=self.tables.device)
        pages = self.tables[sequence, numbers % self.tables.shape[1]].long()
        if self.storage.params.closes_pages:
            read = shard.decode(self.layer, shard.load(self.layer, pages), torch.float32)
            begin = first - first // size * size
            return read._replace(**{side: getattr(read, side)[begin : begin + stop - first] for side in read._fields})
        positions = torch.arange(first, stop, device=pages.device)
        slots = pages[positions // size - first // size] * size + positions % size
        return shard.decode(self.layer, shard.pick(self.layer, slots), torch.float32)

    def _from_ring(self, sequence: int, first: int, stop: int) -> KeysValues:
        assert isinstance(self.step, ClosingStep)
        shard = self.storage.newest.shards[self.shard]
        row, size = int(self.step.open_rows[sequence]), self.storage.params.page_size
        slots = row * size + torch.arange(first, stop) % self.step.ring_tokens
        return shard.decode(self.layer, shard.pick(self.layer, slots), torch.float32)
