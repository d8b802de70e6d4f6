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
from kvcfg.params import MultiKVCacheParams
from kvcfg.units import ceil_div


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
            reads_first=True,
        )
        self.storages = [PagedStorage(group, count, devices) for group, count in zip(params.params, pages, strict=True)]
        self._tables = [
            [torch.full((max_batch_size, width), count, dtype=torch.int32, device=device) for device in devices]
            for width, count in zip(widths, pages, strict=True)
        ]
        self._lengths = [torch.zeros(max_batch_size, dtype=torch.int32, device=device) for device in devices]
        self.batch_size = 0
        # Formats that store every token at once may take any of them back; a window cannot return to what it left.
        self._rollback = max_seq_len if all(group.grows for group in params.params) else params.num_draft_tokens
        self._past_tables = self._tables
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
        past = self._read_past(layer, self.visible_from(layer), start, keys.dtype)
        encoded = storage.encode(_by_token(keys), _by_token(values))
        # A windowed group has pages only for the new tokens that a later query can still see.
        page_size = self.params.page_size
        first = max(start, self.ledger.page_table(0, group).first * page_size)
        kept = torch.arange(first, start + num_tokens, device=keys.device)
        storage.store(
            index,
            [tokens.last_of_each(batch_size, len(kept)) for tokens in encoded],
            (self._pages(self._tables[group], kept // page_size) * page_size + kept % page_size).flatten(),
        )
        self._stored[layer] = start + num_tokens
        fresh = _by_sequence(storage.decode(encoded, keys.dtype), batch_size)
        return KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, fresh, strict=True)))

    def truncate(self, length: int) -> None:
        """Take back the last tokens of every sequence, so that `length` are left.

        Raises:
            ValueError: if `length` is negative or above what is stored, or a window has moved on past it.
        """
        stored = min(self.length(layer) for layer, place in enumerate(self.layers) if place is not None)
        if not 0 <= length <= stored:
            raise ValueError(f"cannot keep {length} of {stored} stored tokens")
        for row in range(self.batch_size):
            self.ledger.truncate(row, length)
        self._stored = [length] * len(self.layers)
        self._set_length(length)

    def release(self) -> None:
        """Forget all sequences; every page is free again."""
        for row in range(self.batch_size):
            self.ledger.release(row)
        self.batch_size = 0
        self._stored = [0] * len(self.layers)
        self._set_length(0)

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
        page_size = self.params.page_size
        needed = self.batch_size * ceil_div(length, page_size) if self.params.grows else 0
        if needed > self.num_pages:
            raise CapacityError(
                f"out of pages: {self.batch_size} sequences of {length} tokens need {needed} pages of {page_size}, "
                f"the cache has {self.num_pages}. "
                f"Try: workload.max_batch_size={self.batch_size} workload.max_seq_len={length}"
            )
        # Layers read the past before they store, and a window may hand its old pages to the tokens that follow.
        self._past_tables = [[table.clone() for table in shards] for shards in self._tables]
        for row in range(self.batch_size):
            self._apply(row, self.ledger.alloc(row, length - self._reserved).new_pages)
            self.ledger.commit(row, length - self._reserved, num_drafts=self._rollback)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self._reserved = length
        for lengths in self._lengths:
            lengths.zero_()[: self.batch_size] = length

    def _apply(self, row: int, runs: Iterable[PageRun]) -> None:
        for run in runs:
            for table in self._tables[run.group]:
                columns = torch.arange(run.first, run.first + len(run.pages)) % table.shape[1]
                table[row, columns] = torch.tensor(run.pages, dtype=torch.int32, device=table.device)

    def _pages(self, shards: list[Tensor], columns: Tensor) -> Tensor:
        table = shards[0]
        return table[: self.batch_size, columns % table.shape[1]].long()

    def _read_past(self, layer: int, start: int, stop: int, dtype: torch.dtype) -> KeysValues:
        storage, group, index = self._place(layer)
        page_size = self.params.page_size
        first, last = start // page_size, -(-stop // page_size)
        columns = torch.arange(first, last, device=self._past_tables[group][0].device)
        pages = self._pages(self._past_tables[group], columns)
        tokens = _by_sequence(storage.read(index, pages.flatten(), dtype), self.batch_size)
        span = slice(start - first * page_size, stop - first * page_size)
        return KeysValues(tokens.keys[:, :, span], tokens.values[:, :, span])


def _by_token(states: Tensor) -> Tensor:
    """`[batch_size, n_heads, num_tokens, dim]` to `[batch_size * num_tokens, n_heads, dim]`."""
    return states.transpose(1, 2).flatten(0, 1)


def _by_sequence(tokens: KeysValues, batch_size: int) -> KeysValues:
    """The opposite of `_by_token`, for keys and values."""
    num_tokens = len(tokens.keys) // batch_size
    return KeysValues(*(item.unflatten(0, (batch_size, num_tokens)).transpose(1, 2) for item in tokens))
