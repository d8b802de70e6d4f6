"""A batch that grows together, as transformers feeds it: every sequence has the same length, padding included.

Every layer appends the keys and values of the same new tokens and gets back all that a query of theirs may read,
as it was stored. The first layer makes room for a step, the last one commits it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcfg.cache.replica import CacheOptions, CacheReplica, Calibration
from kvcfg.cache.step import GroupStep, Step, first_seen
from kvcfg.cache.storage import KeysValues, PagedStorage, Part
from kvcfg.cache.view import LayerView
from kvcfg.errors import CapacityError, ShapeError
from kvcfg.params import MultiKVCacheParams


class PagedKVCache:
    """Pages of all layer groups on the shards of one replica.

    Args:
        params: what each group stores.
        num_pages: pages that growing groups share among sequences; null pages come on top.
        max_batch_size: sequences held at the same time.
        max_seq_len: tokens of the longest one.
        layers: for every layer of the model, in order, its group and its place in it; None for layers that
            store nothing of their own.
        devices: one device per tensor parallel shard.
        calibrated: what was measured beforehand, for recipes that ask for it.

    Attributes:
        replica: the pages; sequences are named by their row.
        batch_size: sequences of the batch; 0 before the first token.

    Raises:
        ShapeError: if devices do not match the shards, or a group keeps no pages (linear state).
    """

    def __init__(
        self,
        params: MultiKVCacheParams,
        *,
        num_pages: int,
        max_batch_size: int,
        max_seq_len: int,
        layers: Sequence[tuple[int, int] | None],
        devices: Sequence[torch.device],
        calibrated: Calibration | None = None,
    ) -> None:
        if unpaged := [group.kind for group in params.params if not group.stores_pages]:
            raise ShapeError(f"the paged cache holds keys and values; {unpaged[0]} layers keep neither")
        self.params, self.layers = params, tuple(layers)
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self.replica = CacheReplica(
            params,
            num_pages=num_pages,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            devices=devices,
            options=CacheOptions(enable_prefix_caching=False),
            calibrated=calibrated,
        )
        self.batch_size = 0
        # Formats that store every token at once may take any of them back; a window cannot return to what it left,
        # and a closed page is not opened again.
        keeps_all = all(group.grows and not group.closes_pages for group in params.params)
        self._rollback = max_seq_len if keeps_all else params.num_draft_tokens
        self._storing = [layer for layer, place in enumerate(self.layers) if place is not None]
        self._stored = [0] * len(self.layers)
        self._step: Step | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated: arenas, page tables and lengths of all shards."""
        return self.replica.nbytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one more token of context, measured on the arenas of the groups that grow."""
        growing = [storage for storage in self.replica.storages if storage is not None and storage.params.grows]
        return sum(storage.page_nbytes for storage in growing) / self.params.page_size

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that sequences hold now, over all shards."""
        held = 0
        for group, storage in enumerate(self.replica.storages):
            if storage is not None:
                tables = [self.replica.ledger.page_table(row, group) for row in range(self.batch_size)]
                held += sum(len(table.pages) for table in tables) * storage.params.bytes_per_block
                held += self.batch_size * storage.params.open_bytes_per_sequence
        return held

    @property
    def clip_rate(self) -> float:
        """Largest share of any group's numbers that was cut off so far, where scales do not follow them; else 0."""
        return max(storage.clip_rate for storage in self.replica.storages if storage is not None)

    def length(self, layer: int) -> int:
        """Tokens of each sequence that one layer of the model has stored, or seen in a windowed group."""
        return self._stored[layer]

    def visible_from(self, layer: int) -> int:
        """Position of the first token that the next query of a layer can see."""
        return first_seen(self._place(layer)[0].params, self._stored[layer])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Store new tokens of every sequence and return all that their queries may read.

        Args:
            layer: index in the model. A step begins once every layer has taken the one before, or with the first
                layer that comes again.
            keys: `[batch_size, n_kv_heads, num_tokens, head_dim]`, any float dtype.
            values: `[batch_size, n_kv_heads, num_tokens, value_dim]`.

        Returns:
            Keys and values `[batch_size, n_kv_heads, length, dim]` as stored, in the dtype of `keys`: all tokens
            for layers that grow; for windowed ones those that the first new query sees, and the new ones.

        Raises:
            CapacityError: if pages, rows or the length do not suffice; nothing was stored.
            ShapeError: if batch, tokens, heads or widths differ from what the cache was built or begun with, or the
                tokens go on over the end of a page that closes.
        """
        storage, _, index = self._place(layer)
        layout, _ = self._meet(layer, keys)
        parts = storage.append(index, layout, _by_token(keys), _by_token(values))
        self._count(layer, keys.shape[2])
        return _dense(parts, keys.shape[0])

    def write(
        self, layer: int, keys: Tensor, values: Tensor, *, value_dim: int | None = None
    ) -> LayerView | KeysValues:
        """Store new tokens of every sequence, for attention that reads pages where they lie.

        Args:
            layer: index in the model, as for `append`.
            keys: `[batch_size, n_kv_heads, num_tokens, head_dim]`, any float dtype.
            values: `[batch_size, n_kv_heads, num_tokens, value_dim]`.
            value_dim: for MLA, how many numbers of the latent are read as value (its rank).

        Returns:
            What their queries may read, until the layer's next tokens are stored. Where they see what cannot be read
            in place (`LayerView.in_place`), or heads are split over shards, what `append` returns.

        Raises:
            CapacityError: as `append`.
            ShapeError: as `append`, or if a latent's rank is missing.
        """
        storage, _, index = self._place(layer)
        layout, tables = self._meet(layer, keys)
        view = storage.view(index, layout, tables, value_dim=value_dim)
        if not view.in_place or len(storage.shards) > 1:
            return self.append(layer, keys, values)
        storage.write(index, layout, _by_token(keys), _by_token(values))
        self._count(layer, keys.shape[2])
        return view

    def read(self, view: LayerView, dtype: torch.dtype) -> KeysValues:
        """What `append` would have returned, in `dtype`, of a layer that was written."""
        storage, step = view.storage, view.step
        new = storage.newest.read_slots(view.layer, step.slots, dtype)
        return _dense([*storage.past(view.layer, step, dtype), Part(new, step.fresh)], len(step.fresh))

    def truncate(self, length: int) -> None:
        """Take back the last tokens of every sequence, so that `length` are left.

        Raises:
            ValueError: if `length` is negative or above what is stored, or a window has moved on past it.
        """
        stored = min(self.length(layer) for layer in self._storing)
        if not 0 <= length <= stored:
            raise ValueError(f"cannot keep {length} of {stored} stored tokens")
        for row in range(self.batch_size):
            self.replica.truncate(row, length)
        self._stored = [length] * len(self.layers)
        self._step = None

    def release(self) -> None:
        """Forget all sequences; every page is free again."""
        for row in range(self.batch_size):
            self.replica.release(row)
        self.batch_size = 0
        self._stored = [0] * len(self.layers)
        self._step = None

    def _place(self, layer: int) -> tuple[PagedStorage, int, int]:
        place = self.layers[layer]
        if place is None:
            raise ShapeError(f"layer {layer} reads another layer's pages and stores none")
        group, index = place
        storage = self.replica.storages[group]
        assert storage is not None
        return storage, group, index

    def _meet(self, layer: int, keys: Tensor) -> tuple[GroupStep, Tensor]:
        """Where a layer reads and writes in its next step, and the page tables that it reads by."""
        _, group, _ = self._place(layer)
        self._begin(keys.shape[0])
        step = self._step_of(layer, keys.shape[2])
        layout, tables = step.groups[group], step.shards[0].lookup[group]
        assert layout is not None and tables is not None
        return layout, tables.view(torch.int32)

    def _count(self, layer: int, num_tokens: int) -> None:
        """Count tokens that a layer has stored; the last layer ends the step."""
        self._stored[layer] += num_tokens
        if all(self._stored[other] == self._stored[layer] for other in self._storing):
            self._commit()

    def _begin(self, batch_size: int) -> None:
        if self.batch_size == batch_size:
            return
        if self.batch_size:
            raise ShapeError(f"the cache was begun with {self.batch_size} sequences and got {batch_size}")
        if batch_size > self.max_batch_size:
            raise CapacityError(
                f"{batch_size} sequences do not fit in a cache for {self.max_batch_size}. "
                f"Try: workload.max_batch_size={batch_size}"
            )
        for row in range(batch_size):
            self.replica.claim(row, None)
        self.batch_size = batch_size

    def _step_of(self, layer: int, num_tokens: int) -> Step:
        """The step that a layer takes with so many tokens: the one under way, or a new one."""
        start = self._stored[layer]
        if self._step is not None and start > self._step.starts[0]:
            self._commit()
        step = self._step or self._next_step(start + num_tokens)
        if (start, num_tokens) != (step.starts[0], step.num_tokens[0]):
            raise ShapeError(
                f"layer {layer} has {start} tokens and got {num_tokens}; this step takes the others from "
                f"{step.starts[0]} by {step.num_tokens[0]}"
            )
        return step

    def _next_step(self, length: int) -> Step:
        """Make room up to `length` tokens and lay out the step that fills it."""
        if length > self.max_seq_len + self.params.spec_decode_cache_slack:
            raise CapacityError(
                f"{length} tokens do not fit in a cache for sequences of {self.max_seq_len}. "
                f"Try: workload.max_seq_len={length}"
            )
        rows = range(self.batch_size)
        num_tokens = length - self.replica.ledger.length(0)
        limit = self.replica.step_limit(0)
        if limit is not None and num_tokens > limit:
            size = self.params.page_size
            raise ShapeError(
                f"pages of this format close when they are full, and later queries read them closed: the model can "
                f"be given {limit} tokens now, not {num_tokens}. Try: generate(…, prefill_chunk_size={size}), or feed "
                f"{size} tokens at a time"
            )
        self.replica.alloc_batch(rows, num_tokens)
        self._step = self.replica.lay_out(rows, [num_tokens] * self.batch_size)
        return self._step

    def _commit(self) -> None:
        """Count the step's tokens as stored."""
        assert self._step is not None
        self.replica.commit(self._step.seq_ids, self._step.num_tokens[0], num_drafts=self._rollback)
        self._step = None


def _by_token(states: Tensor) -> Tensor:
    """`[batch_size, n_heads, num_tokens, dim]` to `[batch_size * num_tokens, n_heads, dim]`."""
    return states.transpose(1, 2).flatten(0, 1)


def _dense(parts: Sequence[Part], batch_size: int) -> KeysValues:
    """Parts that follow each other to `[batch_size, n_heads, num_tokens, dim]`."""
    seen = [_by_sequence(part, batch_size) for part in parts]
    return KeysValues(torch.cat([item.keys for item in seen], 2), torch.cat([item.values for item in seen], 2))


def _by_sequence(part: Part, batch_size: int) -> KeysValues:
    """Packed tokens of equally long sequences to `[batch_size, n_heads, num_tokens, dim]`."""
    span = part.spans[0]
    seen = slice(span.offset, span.offset + span.length)
    return KeysValues(
        *(item.unflatten(0, (batch_size, span.num_rows))[:, seen].transpose(1, 2) for item in part.states)
    )
