"""The paged KV cache: the one place where bytes (storage) and integers (ledger) meet.

A batch of sequences of equal length grows together, as transformers feeds them: every layer appends the keys
and values of the same new tokens and gets back all that a query of theirs may read, as it was stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvcfg.cache.ledger import PageGroup, PageLedger, PageRun
from kvcfg.cache.storage import KeysValues, PagedStorage
from kvcfg.errors import CapacityError, ShapeError
from kvcfg.params import KVCacheParams, MultiKVCacheParams


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
    ) -> None:
        if unpaged := [group.kind for group in params.params if not group.stores_pages]:
            raise ShapeError(f"the paged cache holds keys and values; {unpaged[0]} layers keep neither")
        self.params, self.layers = params, tuple(layers)
        self.num_pages, self.max_batch_size, self.max_seq_len = num_pages, max_batch_size, max_seq_len
        widths = [group.pages_per_sequence(max_seq_len) for group in params.params]
        pages = [
            num_pages if group.grows else max_batch_size * width
            for group, width in zip(params.params, widths, strict=True)
        ]
        self.ledger = PageLedger(
            num_pages,
            params.page_size,
            [
                PageGroup(group.kind, group.kind, group.window, None if group.grows else count)
                for group, count in zip(params.params, pages, strict=True)
            ],
            enable_prefix_caching=False,
        )
        self.storages = [PagedStorage(group, count, devices) for group, count in zip(params.params, pages, strict=True)]
        self._tables = [
            [torch.full((max_batch_size, width), count, dtype=torch.int32, device=device) for device in devices]
            for width, count in zip(widths, pages, strict=True)
        ]
        self._lengths = [torch.zeros(max_batch_size, dtype=torch.int32, device=device) for device in devices]
        self.batch_size = 0
        self._stored = [0] * len(self.layers)
        self._reserved = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated: arenas, page tables and lengths of all shards."""
        tables = [table for shards in self._tables for table in shards]
        return sum(storage.nbytes for storage in self.storages) + sum(item.nbytes for item in (*tables, *self._lengths))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one more token of context, measured on the arenas of the groups that grow."""
        growing = [storage for storage in self.storages if storage.params.grows]
        return sum(storage.nbytes / (storage.num_pages + 1) for storage in growing) / self.params.page_size

    def length(self, layer: int) -> int:
        """Tokens of each sequence that one layer of the model has stored, or seen in a windowed group."""
        return self._stored[layer]

    def visible_from(self, layer: int) -> int:
        """Position of the first token that the next query of a layer can see."""
        window = self._place(layer)[0].params.window
        return 0 if window is None else max(0, self._stored[layer] - window + 1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Store new tokens of every sequence and return all that their queries may read.

        Args:
            layer: index in the model.
            keys: `[batch_size, n_kv_heads, num_tokens, head_dim]`, any float dtype.
            values: `[batch_size, n_kv_heads, num_tokens, value_dim]`.

        Returns:
            Keys and values `[batch_size, n_kv_heads, length, dim]` as stored, in the dtype of `keys`: all tokens
            for layers that grow; for windowed ones the last `window - 1` before the new ones, and those.

        Raises:
            CapacityError: if pages, rows or the length do not suffice; nothing was stored.
            ShapeError: if batch, heads or widths differ from what the cache was built or begun with.
        """
        storage, group, index = self._place(layer)
        batch_size, _, num_tokens, _ = keys.shape
        start = self._stored[layer]
        self._begin(batch_size)
        self._reserve(start + num_tokens)
        past = self._read(layer, self.visible_from(layer), start, keys.dtype)
        encoded = storage.encode(_by_token(keys), _by_token(values))
        # A windowed group has pages only for the new tokens that a later query can still see.
        first = max(start, self.ledger.page_table(0, group).first * self.params.page_size)
        kept = torch.arange(first, start + num_tokens, device=keys.device)
        storage.store(
            index,
            [tokens.last_of_each(batch_size, len(kept)) for tokens in encoded],
            self._slots(group, kept).flatten(),
        )
        self._advance(layer, start + num_tokens)
        fresh = _by_sequence(storage.decode(encoded, keys.dtype), batch_size)
        return KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, fresh, strict=True)))

    def truncate(self, length: int) -> None:
        """Take back the last tokens of every sequence, so that `length` are left.

        Raises:
            ValueError: if `length` is negative or above what is stored, or a window has moved on past it.
        """
        if not 0 <= length <= min(self._stored, default=0):
            raise ValueError(f"cannot keep {length} of {min(self._stored, default=0)} stored tokens")
        for row in range(self.batch_size):
            self.ledger.truncate(row, length)
        self._stored = [length] * len(self.layers)
        self._reserved = length
        self._set_lengths()

    def release(self) -> None:
        """Forget all sequences; every page is free again."""
        for row in range(self.batch_size):
            self.ledger.release(row)
        self.batch_size = self._reserved = 0
        self._stored = [0] * len(self.layers)
        self._set_lengths()

    def _place(self, layer: int) -> tuple[PagedStorage, int, int]:
        place = self.layers[layer]
        if place is None:
            raise ShapeError(f"layer {layer} reads another layer's pages and stores none")
        group, index = place
        return self.storages[group], group, index

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
            self.ledger.claim(row)
        self.batch_size = batch_size

    def _reserve(self, length: int) -> None:
        if length <= self._reserved:
            return
        if length > self.max_seq_len + self.params.spec_decode_cache_slack:
            raise CapacityError(
                f"{length} tokens do not fit in a cache for sequences of {self.max_seq_len}. "
                f"Try: workload.max_seq_len={length}"
            )
        try:
            for row in range(self.batch_size):
                self._apply(self.ledger.alloc(row, length - self._reserved).new_pages)
        except CapacityError:
            for row in range(self.batch_size):
                self.ledger.truncate(row, self._reserved)
            raise
        self._reserved = length

    def _advance(self, layer: int, length: int) -> None:
        before = min(self._lengths_of_storing_layers())
        self._stored[layer] = length
        after = min(self._lengths_of_storing_layers())
        if after > before:
            for row in range(self.batch_size):
                self.ledger.commit(row, after - before)
            self._set_lengths()

    def _lengths_of_storing_layers(self) -> Iterable[int]:
        return (stored for stored, place in zip(self._stored, self.layers, strict=True) if place is not None)

    def _set_lengths(self) -> None:
        for lengths in self._lengths:
            lengths.zero_()[: self.batch_size] = min(self._lengths_of_storing_layers())

    def _apply(self, runs: Iterable[PageRun]) -> None:
        for run in runs:
            for table in self._tables[run.group]:
                columns = torch.arange(run.first, run.first + len(run.pages)) % table.shape[1]
                table[run.seq_id, columns] = torch.tensor(run.pages, dtype=torch.int32, device=table.device)

    def _pages(self, group: int, columns: Tensor) -> Tensor:
        table = self._tables[group][0]
        return table[: self.batch_size, columns % table.shape[1]].long()

    def _slots(self, group: int, positions: Tensor) -> Tensor:
        page_size = self.params.page_size
        return self._pages(group, positions // page_size) * page_size + positions % page_size

    def _read(self, layer: int, start: int, stop: int, dtype: torch.dtype) -> KeysValues:
        storage, group, index = self._place(layer)
        page_size = self.params.page_size
        first, last = start // page_size, -(-stop // page_size)
        columns = torch.arange(first, last, device=self._tables[group][0].device)
        tokens = _by_sequence(storage.read(index, self._pages(group, columns).flatten(), dtype), self.batch_size)
        span = slice(start - first * page_size, stop - first * page_size)
        return KeysValues(tokens.keys[:, :, span], tokens.values[:, :, span])


def _by_token(states: Tensor) -> Tensor:
    """`[batch_size, n_heads, num_tokens, dim]` to `[batch_size * num_tokens, n_heads, dim]`."""
    return states.transpose(1, 2).flatten(0, 1)


def _by_sequence(tokens: KeysValues, batch_size: int) -> KeysValues:
    """The opposite of `_by_token`, for keys and values."""
    num_tokens = len(tokens.keys) // batch_size
    return KeysValues(*(item.unflatten(0, (batch_size, num_tokens)).transpose(1, 2) for item in tokens))
