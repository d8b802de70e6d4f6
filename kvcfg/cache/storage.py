"""The bytes of one layer group: pages of keys, values and scales in one arena per tensor parallel shard.

    arena               uint8 [num_layers, num_pages + 1, bytes_per_layer_page]; the last page is the null page
    one layer's page    key elements | value elements | key scales | value scales, each row after row
    row                 what is encoded together: a token, or all of the page where pages close (`closing.py`)
    slot                page * rows of a page + offset: where one row lives

Everything is written and read as bytes, so any width of head and any format packs without padding, and a
page can move to another place as its slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.cache.kernel_writes import head_scales, page_closers, token_writer
from kvcfg.cache.layout import page_layout, value_width
from kvcfg.cache.step import GroupStep, Span
from kvcfg.cache.view import LayerPages, LayerView
from kvcfg.errors import ShapeError
from kvcfg.formats.codec import Codec, Encoded, LayerCalibration, clip_rate
from kvcfg.kernels.cpu.close import OpenPages
from kvcfg.params import KVCacheParams


class KeysValues(NamedTuple):
    """Keys `[num_tokens, n_kv_heads, head_dim]` and values `[num_tokens, n_kv_heads, value_dim]`."""

    keys: Tensor
    values: Tensor


class Part(NamedTuple):
    """Part of what queries see: packed tokens, and per sequence which of them."""

    states: KeysValues
    spans: tuple[Span, ...]


class EncodedTokens(NamedTuple):
    """Keys and values of some tokens as they are stored, for one shard."""

    keys: Encoded
    values: Encoded

    def at(self, rows: Tensor) -> EncodedTokens:
        """Some of the tokens; `rows` is `[n]` int64."""
        return EncodedTokens(*(Encoded(*(part[rows.to(part.device)] for part in side)) for side in self))


class PagedStorage:
    """The pages of one layer group on the shards of one replica.

    Args:
        params: what a page holds.
        num_pages: pages that can be handed out; one more is allocated, the null page.
        devices: one device per tensor parallel shard.
        calibrated: what was measured beforehand, layer by layer; None = nothing.
    """

    def __init__(
        self,
        params: KVCacheParams,
        num_pages: int,
        devices: Sequence[torch.device],
        calibrated: Sequence[LayerCalibration] | None = None,
    ) -> None:
        if len(devices) != params.tensor_parallel_degree:
            raise ShapeError(f"{params.tensor_parallel_degree} shards need as many devices, got {len(devices)}")
        self.params, self.num_pages = params, num_pages
        self._heads = [_heads_of(params, rank) for rank in range(len(devices))]
        self.shards = [
            _Shard(params, num_pages, device, [_of_heads(item, heads) for item in calibrated or ()])
            for device, heads in zip(devices, self._heads, strict=True)
        ]
        self._layer_pages: dict[tuple[int, int, int], LayerPages] = {}
        self._readers = [self._heads.index(heads) for heads in dict.fromkeys(self._heads)]

    @property
    def nbytes(self) -> int:
        """Bytes held by the arenas of all shards, null pages included."""
        return sum(shard.arena.nbytes for shard in self.shards)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page over all layers and shards, measured on the arenas."""
        return sum(shard.arena[:, 0].numel() for shard in self.shards)

    @property
    def clip_rate(self) -> float:
        """Share of the numbers stored so far that were cut off, where scales do not follow them; else 0."""
        return clip_rate([codec for shard in self.shards for pair in shard.codecs for codec in pair])

    def view(
        self, layer: int, step: GroupStep, tables: Tensor, *, shard: int = 0, value_dim: int | None = None
    ) -> LayerView:
        """What attention may see of a layer in a step.

        Args:
            layer: index within the group, in `[0, num_layers)`.
            step: where the group reads and writes.
            tables: `[num_sequences, columns]` int32, the group's page tables of the step.
            shard: tensor parallel shard.
            value_dim: for MLA, how many numbers of the latent are read as value (its rank).

        Raises:
            ShapeError: if a latent's rank is missing or too large.
        """
        return LayerView(self, layer, shard, tables, step, value_width(self.params, value_dim))

    def layer_pages(self, layer: int, shard: int, value_dim: int) -> LayerPages:
        """The pages of one layer on one shard, as kernels are told of them; made once."""
        place = (layer, shard, value_dim)
        found = self._layer_pages.get(place)
        if found is None:
            layout = page_layout(self.params, value_dim)
            ints = () if layout is None else tuple(layout.ints())
            keys, values = self.shards[shard].codecs[layer]
            codecs = (keys, keys if self.params.is_mla else values)
            found = LayerPages(self.shards[shard].arena[layer], layout, ints, _levels(codecs), head_scales(codecs))
            self._layer_pages[place] = found
        return found

    def encode(self, layer: int, keys: Tensor, values: Tensor) -> list[EncodedTokens]:
        """Tokens, or whole pages where they close, as every shard stores them; the inputs are left unchanged.

        Args:
            layer: index within the group, in `[0, num_layers)`.
            keys: `[num_tokens, n_kv_heads, head_dim]`, any float dtype, before any split over shards; of pages
                `[num_pages, page_size, n_kv_heads, head_dim]`.
            values: the same with value_dim; of a latent (MLA) `[num_tokens, 1, 0]`.

        Raises:
            ShapeError: if heads or widths differ from the parameters.
        """
        params = self.params
        n_heads = max(heads.stop for heads in self._heads)
        _expect(keys, "keys", n_heads, params.head_dim)
        _expect(values, "values", n_heads, params.value_dim)
        return [
            shard.encode(layer, keys[..., heads.start : heads.stop, :], values[..., heads.start : heads.stop, :])
            for shard, heads in zip(self.shards, self._heads, strict=True)
        ]

    def store(self, layer: int, encoded: Sequence[EncodedTokens], slots: Tensor) -> None:
        """Put encoded tokens, or pages, at their slots.

        Args:
            layer: index within the group, in `[0, num_layers)`.
            encoded: what `encode` returned.
            slots: `[num_rows]` int64, no repeats; of pages that close their ids.
        """
        for shard, tokens in zip(self.shards, encoded, strict=True):
            shard.store(layer, tokens, slots)

    @property
    def newest(self) -> PagedStorage:
        """What holds tokens as they come."""
        return self

    def append(self, layer: int, step: GroupStep, keys: Tensor, values: Tensor) -> list[Part]:
        """Store a step's tokens; what its queries see, the past first, as stored, in the dtype of `keys`.

        Args:
            layer: index within the group, in `[0, num_layers)`.
            step: where the group reads and writes.
            keys: `[num_tokens, n_kv_heads, head_dim]`, one sequence after the other.
            values: `[num_tokens, n_kv_heads, value_dim]`.
        """
        past = self.past(layer, step, keys.dtype)
        encoded = self.newest.encode(layer, keys, values)
        self.keep(layer, step, encoded)
        return [*past, Part(self.newest.decode(layer, encoded, keys.dtype), step.fresh)]

    def write(self, layer: int, step: GroupStep, keys: Tensor, values: Tensor) -> None:
        """Store a step's tokens."""
        if not self.put(layer, keys, values, step.slots, step.stored):
            self.keep(layer, step, self.encode(layer, keys, values))

    def put(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor, rows: Tensor | None) -> bool:
        """Encode tokens and store them in one pass of a kernel; False, and nothing stored, if there is none for them.

        Args:
            layer: index within the group, in `[0, num_layers)`.
            keys: `[num_tokens, n_kv_heads, head_dim]`.
            values: `[num_tokens, n_kv_heads, value_dim]`.
            slots: `[num_stored]` int64, no repeats.
            rows: `[num_stored]` int64, which of the tokens are stored; None = all.
        """
        return len(self.shards) == 1 and self.shards[0].put(layer, keys, values, slots, rows)

    def keep(self, layer: int, step: GroupStep, encoded: Sequence[EncodedTokens]) -> None:
        """Store a step's tokens, which are encoded already."""
        if len(step.slots):
            kept = encoded if step.stored is None else [tokens.at(step.stored) for tokens in encoded]
            self.store(layer, kept, step.slots)

    def past(self, layer: int, step: GroupStep, dtype: torch.dtype) -> list[Part]:
        """What a step's queries see of the tokens before it."""
        return [Part(self.read(layer, step.past_pages, dtype), step.past)]

    def decode(self, layer: int, encoded: Sequence[EncodedTokens], dtype: torch.dtype) -> KeysValues:
        """Encoded tokens of a layer as a reader sees them, all heads, in `dtype`, on the first shard's device."""
        parts = [self.shards[rank].decode(layer, encoded[rank], dtype) for rank in self._readers]
        if len(parts) == 1:
            return parts[0]
        home = parts[0].keys.device
        return KeysValues(
            torch.cat([part.keys.to(home) for part in parts], dim=1),
            torch.cat([part.values.to(home) for part in parts], dim=1),
        )

    def read(self, layer: int, pages: Tensor, dtype: torch.dtype) -> KeysValues:
        """All tokens of some pages, in order.

        Args:
            layer: index within the group, in `[0, num_layers)`.
            pages: `[n]` int64 page ids, repeats allowed.
            dtype: what the numbers are returned in.

        Returns:
            Keys and values of `n * page_size` tokens; slots never written hold anything.
        """
        return self.decode(layer, [shard.load(layer, pages) for shard in self.shards], dtype)

    def read_slots(self, layer: int, slots: Tensor, dtype: torch.dtype) -> KeysValues:
        """The tokens at some slots `[n]` int64, in order; not where pages close."""
        return self.decode(layer, [shard.pick(layer, slots) for shard in self.shards], dtype)

    def copy_pages(self, sources: Tensor, targets: Tensor, origin: PagedStorage | None = None) -> None:
        """Copy whole pages, all layers, byte for byte.

        Args:
            sources: `[n]` int64 pages of `origin`.
            targets: `[n]` int64 pages of this storage.
            origin: another replica's storage of the same group; None = this one.
        """
        for shard, other in zip(self.shards, (origin or self).shards, strict=True):
            shard.arena[:, targets.to(shard.device)] = other.arena[:, sources.to(other.device)].to(shard.device)


class _Shard:
    """One device's part of every page: some of the heads."""

    def __init__(
        self, params: KVCacheParams, num_pages: int, device: torch.device, calibrated: Sequence[LayerCalibration]
    ) -> None:
        recipe, n_heads = params.storage, params.n_kv_heads_per_device
        together = params.page_size if params.closes_pages else None
        self.device, self.rows_per_page = device, 1 if together else params.page_size
        pairs = [
            (
                Codec(recipe.keys, n_heads, params.head_dim, together, layer and layer.keys),
                Codec(recipe.values, n_heads, params.value_dim, together, layer and layer.values),
            )
            for layer in calibrated or (None,)
        ]
        self.codecs = pairs if calibrated else pairs * params.num_layers
        self.token_writer = token_writer(params, self.codecs) if device.type == "cpu" else None
        self.closers = page_closers(params, self.codecs, calibrated) if device.type == "cpu" else None
        keys, values = pairs[0]
        rows = (keys.element_row_bytes, values.element_row_bytes, keys.scale_row_bytes, values.scale_row_bytes)
        shape = (params.num_layers, num_pages + 1, params.bytes_per_layer_page)
        self.arena = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._layers, self._row_parts = self.arena.unbind(), list(rows)
        starts = [self.rows_per_page * sum(rows[:index]) for index in range(len(rows))]
        self._regions = [
            self.arena[:, :, start : start + self.rows_per_page * row].unflatten(-1, (self.rows_per_page, row))
            if row
            else None
            for start, row in zip(starts, rows, strict=True)
        ]

    def encode(self, layer: int, keys: Tensor, values: Tensor) -> EncodedTokens:
        if self.token_writer is not None:
            rows = self.token_writer.encode(layer, keys, values)
            if rows is not None:
                return self.split(rows)
        key_codec, value_codec = self.codecs[layer]
        return EncodedTokens(key_codec.encode(keys.to(self.device)), value_codec.encode(values.to(self.device)))

    def put(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor, rows: Tensor | None) -> bool:
        writer = self.token_writer
        return writer is not None and writer.put(layer, keys, values, slots, rows, self._layers[layer])

    def close(self, layer: int, pages: Tensor, places: Tensor, opened: _Shard, fresh: EncodedTokens | None) -> bool:
        """Fill pages in one pass of a kernel; False if there is none: the arguments of `PageCloser.close`."""
        writer = opened.token_writer
        if self.closers is None or writer is None:
            return False
        ring = OpenPages(opened.arena[layer], writer.layout)
        rows = None if fresh is None else OpenPages(torch.cat(_in_page_order(fresh), dim=1), writer.row_layout)
        return self.closers[layer].close(pages, self._layers[layer], places, ring, rows or ring)

    def split(self, rows: Tensor) -> EncodedTokens:
        """Rows of a token each, as a page of one token holds them, taken apart."""
        key_elements, value_elements, key_scales, value_scales = rows.split(self._row_parts, dim=1)
        return EncodedTokens(Encoded(key_elements, key_scales), Encoded(value_elements, value_scales))

    def store(self, layer: int, tokens: EncodedTokens, slots: Tensor) -> None:
        slots = slots.to(self.device)
        places = (slots // self.rows_per_page, slots % self.rows_per_page)
        for region, rows in zip(self._regions, _in_page_order(tokens), strict=True):
            if region is not None:
                region[layer].index_put_(places, rows)

    def load(self, layer: int, pages: Tensor) -> EncodedTokens:
        pages = pages.to(self.device)
        return self._gathered(
            len(pages) * self.rows_per_page, lambda region: region[layer].index_select(0, pages).flatten(0, 1)
        )

    def pick(self, layer: int, slots: Tensor) -> EncodedTokens:
        slots = slots.to(self.device)
        pages, offsets = slots // self.rows_per_page, slots % self.rows_per_page
        return self._gathered(len(slots), lambda region: region[layer][pages, offsets])

    def decode(self, layer: int, tokens: EncodedTokens, dtype: torch.dtype) -> KeysValues:
        key_codec, value_codec = self.codecs[layer]
        keys, values = key_codec.decode(tokens.keys, dtype), value_codec.decode(tokens.values, dtype)
        return KeysValues(*(rows.flatten(0, 1) if rows.ndim == 4 else rows for rows in (keys, values)))

    def _gathered(self, num_rows: int, gather: Callable[[Tensor], Tensor]) -> EncodedTokens:
        nothing = torch.empty((num_rows, 0), dtype=torch.uint8, device=self.device)
        parts = [nothing if region is None else gather(region) for region in self._regions]
        key_elements, value_elements, key_scales, value_scales = parts
        return EncodedTokens(Encoded(key_elements, key_scales), Encoded(value_elements, value_scales))


def _levels(codecs: Sequence[Codec]) -> Tensor | None:
    levels = [codec.levels for codec in codecs]
    if not any(item is not None and len(item) == 16 for item in levels):
        return None
    return torch.stack([torch.zeros(16) if item is None or len(item) != 16 else item for item in levels])


def _in_page_order(tokens: EncodedTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tokens.keys.elements, tokens.values.elements, tokens.keys.scales, tokens.values.scales


def _of_heads(layer: LayerCalibration, heads: range) -> LayerCalibration:
    return LayerCalibration(*(side.of_heads(slice(heads.start, heads.stop)) for side in layer))


def _heads_of(params: KVCacheParams, rank: int) -> range:
    """The heads that a shard stores: a share of them, or a copy of one where there are more shards than heads."""
    n_heads = 1 if params.is_mla else params.n_kv_heads
    first = rank * n_heads // params.tensor_parallel_degree
    return range(first, first + params.n_kv_heads_per_device)


def _expect(tensor: Tensor, name: str, n_heads: int, dim: int) -> None:
    if tensor.ndim < 3 or tensor.shape[-2:] != (n_heads, dim):
        raise ShapeError(f"{name} must be [num_tokens, {n_heads}, {dim}], got {list(tensor.shape)}")
