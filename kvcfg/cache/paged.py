"""A batch that grows together, as transformers feeds it: every sequence has the same length, padding included.

Every layer appends the keys and values of the same new tokens and gets back all that a query of theirs may read,
as it was stored. The first layer makes room for a step, the last one commits it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from kvcfg.cache.batches import copy_sequences, cut_back, fork_sequences
from kvcfg.cache.closing_step import segments
from kvcfg.cache.replica import CacheOptions, CacheReplica, Calibration
from kvcfg.cache.step import GroupStep, Step, first_seen
from kvcfg.cache.storage import KeysValues, PagedStorage, Part
from kvcfg.cache.view import LayerView
from kvcfg.errors import CapacityError, ShapeError
from kvcfg.params import MultiKVCacheParams
from kvcfg.units import ceil_div

_log = logging.getLogger("kvcfg")

LEAST_DRAFTS, MOST_DRAFTS = 32, 256
"""Tokens that can be taken back once drafts are expected, whatever was planned; longer steps are taken for prompts."""


class PagedKVCache:
    """Pages of all layer groups on the shards of one replica.

    `copy.deepcopy` gives a cache with pages of its own, so that both go on from what was stored.

    Args:
        params: what each group stores.
        num_pages: pages that growing groups share among sequences; null pages come on top.
        max_batch_size: sequences held at the same time.
        max_seq_len: tokens of the longest one.
        layers: for every layer of the model, in order, its group and its place in it; None for layers that
            store nothing of their own.
        devices: one device per tensor parallel shard.
        options: prefix caching and eviction; None = sequences share nothing that they were not forked from.
        calibrated: what was measured beforehand, for recipes that ask for it.

    Attributes:
        replica: the pages.

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
        options: CacheOptions | None = None,
        calibrated: Calibration | None = None,
    ) -> None:
        if unpaged := [group.kind for group in params.params if not group.stores_pages]:
            raise ShapeError(f"the paged cache holds keys and values; {unpaged[0]} layers keep neither")
        self.params, self.layers = params, tuple(layers)
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self._num_pages, self._devices, self._calibrated = num_pages, tuple(devices), calibrated
        self._options = options or CacheOptions(enable_prefix_caching=False)
        self.replica = self._new_replica()
        self._sequences: list[int] = []
        self._names = count()
        self._storing = [layer for layer, place in enumerate(self.layers) if place is not None]
        self._stored = [0] * len(self.layers)
        self._oldest_end, self._expects_drafts = 0, False
        self._step: Step | None = None
        self._pieces: dict[int, GroupStep] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedKVCache:
        made = PagedKVCache(
            self.params,
            num_pages=self._num_pages,
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
            layers=self.layers,
            devices=self._devices,
            options=self._options,
            calibrated=self._calibrated,
        )
        copy_sequences(self.replica, made.replica, self._sequences)
        made._sequences, made._names = list(self._sequences), count(max(self._sequences, default=-1) + 1)
        made._stored = list(self._stored)
        made._oldest_end, made._expects_drafts = self._oldest_end, self._expects_drafts
        return made

    @property
    def batch_size(self) -> int:
        """Sequences of the batch; 0 before the first token."""
        return len(self._sequences)

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
                tables = [self.replica.ledger.page_table(sequence, group) for sequence in self._sequences]
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

    def keeps_latents(self, layer: int) -> bool:
        """Whether a layer stores one latent for each token (MLA) instead of keys and values."""
        return self._place(layer)[0].params.is_mla

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
        self._check_whole(layer, keys.shape[2])
        layout, _ = self._meet(layer, keys)
        storage, _, index = self._place(layer)
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
        self._check_whole(layer, keys.shape[2])
        layout, tables = self._meet(layer, keys)
        storage, _, index = self._place(layer)
        seen = _stored(storage.view(index, layout, tables, value_dim=value_dim), keys, values)
        self._count(layer, keys.shape[2])
        return seen

    def pieces(self, layer: int, num_tokens: int) -> list[int]:
        """How many of so many new tokens read the same bytes, one run after the other.

        Where pages close, those of a page read the pages before it closed; else there is one run.
        """
        params, start = self._place(layer)[0].params, self._stored[layer]
        if not params.closes_pages:
            return [num_tokens]
        closed = self.replica.ledger.num_closed(self._sequences[0]) if self._sequences else 0
        runs = segments(start, num_tokens, closed, params.page_size, params.num_draft_tokens)
        return [run.stop - run.start for run in runs]

    def write_in_pieces(
        self, layer: int, keys: Tensor, values: Tensor, *, value_dim: int | None = None
    ) -> Iterator[tuple[slice, LayerView | KeysValues]]:
        """Store new tokens run after run (`pieces`), each to be read before the next one is asked for.

        Args:
            layer: index in the model, as for `append`.
            keys: `[batch_size, n_kv_heads, num_tokens, head_dim]`, any float dtype.
            values: `[batch_size, n_kv_heads, num_tokens, value_dim]`.
            value_dim: as for `write`.

        Yields:
            Which of the new tokens a run is, and what their queries may read, as `write` returns it.

        Raises:
            CapacityError: as `append`.
            ShapeError: as `append`, and if a latent's rank is missing.
        """
        layout, tables = self._meet(layer, keys)
        storage, group, index = self._place(layer)
        start, offset = self._stored[layer], 0
        for length in self.pieces(layer, keys.shape[2]):
            span = slice(offset, offset + length)
            piece = layout if length == keys.shape[2] else self._piece(group, start + offset, length)
            view = storage.view(index, piece, tables, value_dim=value_dim)
            yield span, _stored(view, keys[:, :, span], values[:, :, span])
            offset += length
        self._count(layer, keys.shape[2])

    def refusal(self, limit: int, num_tokens: int) -> ShapeError:
        """The error for tokens that read different bytes, of which `limit` can be given at a time."""
        size = self.params.page_size
        return ShapeError(
            f"pages of this format close when they are full, and later queries read them closed: the model can be "
            f"given at most {limit} tokens now, not {num_tokens}. Try: model.set_attn_implementation('kvcfg'), which "
            f"goes from page to page itself; or generate(…, prefill_chunk_size={size}), or feed {size} tokens at a time"
        )

    def read(self, view: LayerView, dtype: torch.dtype) -> KeysValues:
        """What `append` would have returned, in `dtype`, of a layer that was written."""
        storage, step = view.storage, view.step
        new = storage.newest.read_slots(view.layer, step.slots, dtype)
        return _dense([*storage.past(view.layer, step, dtype), Part(new, step.fresh)], len(step.fresh))

    def truncate(self, length: int) -> None:
        """Take back the last tokens of every sequence, so that `length` are left.

        Raises:
            ValueError: if `length` is negative or above what is stored, a window has moved on past it, or it lies
                inside a page that has closed and been stored anew.
        """
        stored = min(self.length(layer) for layer in self._storing)
        if not 0 <= length <= stored:
            raise ValueError(f"cannot keep {length} of {stored} stored tokens")
        try:
            if length < self._oldest_end:
                raise ValueError(
                    f"cannot cut sequences of {stored} tokens to {length}: what was stored before drafts were expected "
                    f"can be cut to {self._oldest_end}"
                )
            for sequence in self._sequences:
                cut_back(self.replica, sequence, length)
        except ValueError as error:
            raise ValueError(
                f"{error}. Try: speculative.speculative_method=standalone "
                f"speculative.num_speculative_tokens={stored - length}, which keeps what that takes"
            ) from error
        self._stored = [length] * len(self.layers)
        self._end_step()

    def select(self, rows: Sequence[int]) -> None:
        """Make another batch of the sequences: its n-th one is what sequence `rows[n]` was.

        A sequence that is named again shares the pages that are full, and gets copies of the others; one that is not
        named is forgotten.

        Raises:
            CapacityError: if the cache was not built for so many sequences, or pages do not suffice for the copies;
                nothing changed then.
            ValueError: if a row is not in the batch.
        """
        if wrong := [row for row in rows if not 0 <= row < self.batch_size]:
            raise ValueError(f"there is no sequence {wrong[0]} in a batch of {self.batch_size}")
        self._check_batch(len(rows))
        self._sequences = fork_sequences(self.replica, self._sequences, rows, self._names)
        self._end_step()

    def expect_drafts(self) -> None:
        """From now on, keep what it takes to take back most of a step (`truncate`).

        Formats that store every token at once keep it anyway. Windows, and pages that close, need room for it, and
        drafts may go beyond the longest sequence. Where the plan has less than steps turn out to need, everything
        moves to pages with that room.

        Raises:
            CapacityError: if the sequences do not fit there.
        """
        self._expects_drafts = True
        if not self._keeps_all:
            self._make_room_for_drafts(LEAST_DRAFTS)

    def release(self) -> None:
        """Forget all sequences; every page is free again."""
        for sequence in self._sequences:
            self.replica.release(sequence)
        self._sequences = []
        self._stored, self._oldest_end = [0] * len(self.layers), 0
        self._end_step()

    @property
    def _keeps_all(self) -> bool:
        """Whether any token can be taken back: windows do not return to what they left, closed pages stay closed."""
        return all(group.grows and not group.closes_pages for group in self.params.params)

    def _make_room_for_drafts(self, num_tokens: int) -> None:
        """Be able to take back so many tokens of the steps to come, or to store them beyond the longest sequence."""
        if self.params.num_draft_tokens >= num_tokens:
            return
        room = 1 << (num_tokens - 1).bit_length()  # drafters that vary their length make it grow a few times only
        planned = self.replica
        self._oldest_end = max(0, min(self._stored) - self.params.num_draft_tokens)
        groups = [
            replace(group, num_draft_tokens=room, speculative_method=group.speculative_method or "standalone")
            for group in self.params.params
        ]
        slack = self.params.spec_decode_cache_slack
        self.params = MultiKVCacheParams.from_params(*groups)
        self._num_pages += ceil_div(self.params.spec_decode_cache_slack - slack, self.params.page_size)
        self.replica = self._new_replica()
        copy_sequences(planned, self.replica, self._sequences)
        _log.info(
            "up to %d tokens may be taken back, with %d bytes more than planned. To plan them: "
            "speculative.speculative_method=standalone speculative.num_speculative_tokens=%d",
            room,
            self.replica.nbytes - planned.nbytes,
            room,
        )

    def _new_replica(self) -> CacheReplica:
        return CacheReplica(
            self.params,
            num_pages=self._num_pages,
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
            devices=self._devices,
            options=self._options,
            calibrated=self._calibrated,
        )

    def _place(self, layer: int) -> tuple[PagedStorage, int, int]:
        place = self.layers[layer]
        if place is None:
            raise ShapeError(f"layer {layer} reads another layer's pages and stores none")
        group, index = place
        storage = self.replica.storages[group]
        assert storage is not None
        return storage, group, index

    def _meet(self, layer: int, keys: Tensor) -> tuple[GroupStep, Tensor]:
        """Where a layer reads and writes in its next step, and the page tables that it reads by.

        A step that begins may move everything to other pages, so where they are is to be asked afterwards.
        """
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

    def _piece(self, group: int, start: int, length: int) -> GroupStep:
        """The part of the step under way that begins at a position; groups whose pages close share it."""
        if start not in self._pieces:
            starts, lengths = [start] * self.batch_size, [length] * self.batch_size
            self._pieces[start] = self.replica.lay_out_group(group, self._sequences, starts, lengths)
        return self._pieces[start]

    def _check_whole(self, layer: int, num_tokens: int) -> None:
        runs = self.pieces(layer, num_tokens)
        if len(runs) > 1:
            raise self.refusal(runs[0], num_tokens)

    def _check_batch(self, batch_size: int) -> None:
        if batch_size > self.max_batch_size:
            raise CapacityError(
                f"{batch_size} sequences do not fit in a cache for {self.max_batch_size}. "
                f"Try: workload.max_batch_size={batch_size}"
            )

    def _begin(self, batch_size: int) -> None:
        if self.batch_size == batch_size:
            return
        if self.batch_size:
            raise ShapeError(f"the cache was begun with {self.batch_size} sequences and got {batch_size}")
        self._check_batch(batch_size)
        self._sequences = [next(self._names) for _ in range(batch_size)]
        for sequence in self._sequences:
            self.replica.claim(sequence, None)

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
        stored = self.replica.ledger.length(self._sequences[0])
        num_tokens, beyond = length - stored, length - self.max_seq_len
        if self._expects_drafts:
            drafts = num_tokens - 1 if stored and not self._keeps_all else 0
            self._make_room_for_drafts(max(drafts, beyond) if max(drafts, beyond) <= MOST_DRAFTS else 0)
        if beyond > self.params.spec_decode_cache_slack:
            raise CapacityError(
                f"{length} tokens do not fit in a cache for sequences of {self.max_seq_len}. "
                f"Try: workload.max_seq_len={length}"
            )
        self.replica.alloc_batch(self._sequences, num_tokens)
        self._step = self.replica.lay_out(self._sequences, [num_tokens] * self.batch_size)
        return self._step

    def _commit(self) -> None:
        """Count the step's tokens as stored."""
        assert self._step is not None
        self.replica.commit(self._step.seq_ids, self._step.num_tokens[0])
        self._end_step()

    def _end_step(self) -> None:
        self._step = None
        self._pieces.clear()


def _stored(view: LayerView, keys: Tensor, values: Tensor) -> LayerView | KeysValues:
    """Store a run of a step where a view shows it; the view, or what it shows if that cannot be read in place."""
    new = _by_token(keys), _by_token(values)
    if not view.in_place or len(view.storage.shards) > 1:
        return _dense(view.storage.append(view.layer, view.step, *new), keys.shape[0])
    view.storage.write(view.layer, view.step, *new)
    return view


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
