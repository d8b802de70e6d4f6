"""What is timed of a shape: each kernel with what it does to its pages, beside the same in plain torch.

    decode    one query of every sequence, over its whole context
    prefill   the last queries of one sequence, over its whole context: a chunk of a prompt
    append    the new tokens of either, quantized and put into their pages
    close     full pages of every sequence, from the open format to the recipe's own

Before anything is timed a kernel's result is compared with the reference's on the same pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from kvcfg.attention import Reach, causal, reference
from kvcfg.attention.cpu import attend_compiled
from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.storage import EncodedTokens, KeysValues, PagedStorage
from kvcfg.evaluation.kernel_pages import KernelPages

DECODE, PREFILL, APPEND, CLOSE = "decode", "prefill", "append", "close"

_CHUNK_TOKENS = 512
_MOST_SCORES = 1 << 24
"""Scores that torch's path may hold at once in a prefill: 64 MiB of float32, and a few copies of them."""

_CHECKED = 32


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One kernel at work.

    Attributes:
        kernel: decode, prefill, append or close.
        batch_size: sequences, or pages that close.
        new_tokens: queries, or tokens that are stored, of each sequence; of a page that closes all of them.
        context: tokens that the last query sees; None where nothing is read.
        nbytes: bytes of pages that one call must read, or writes.
        error: relative L2 distance to the reference; None where there is no kernel for these pages.
        compiled: the kernel, each call on the next layer; None where there is none.
        torch: the same in torch.
    """

    kernel: str
    batch_size: int
    new_tokens: int
    context: int | None
    nbytes: int
    error: float | None
    compiled: Callable[[], object] | None
    torch: Callable[[], object]


def kernel_cases(pages: KernelPages) -> Iterator[KernelCase]:
    """All cases of a shape, checked; nothing is timed."""
    batch_size, chunk = pages.batch_size, chunk_tokens(pages)
    yield _attention(DECODE, pages, batch_size, 1)
    yield _attention(PREFILL, pages, 1, chunk)
    yield _append(pages, batch_size, 1)
    yield _append(pages, 1, chunk)
    if isinstance(pages.storage, ClosingStorage):
        yield _close(pages, pages.storage)


def chunk_tokens(pages: KernelPages) -> int:
    """Tokens of a prompt that are read at a time: what torch has memory for, and the page that is being filled."""
    if isinstance(pages.storage, ClosingStorage):
        limit = pages.context - pages.closed_tokens
    else:
        limit = min(_CHUNK_TOKENS, pages.context)
    most = max(1, _MOST_SCORES // (pages.shape.n_q_heads * pages.context))
    return limit if limit <= most else 1 << most.bit_length() - 1


def _attention(kernel: str, pages: KernelPages, num_sequences: int, num_tokens: int) -> KernelCase:
    start = pages.context - num_tokens
    reach = causal([start] * num_sequences, [num_tokens] * num_sequences)
    queries, scale = pages.queries(num_sequences * num_tokens), pages.shape.scale
    views = pages.views(pages.step(num_sequences, num_tokens))
    found = attend_compiled(queries, views[0], reach, scale=scale)
    error = None
    if found is not None:
        rows, picked = _some(reach)
        exact = reference.attend(queries[rows].double(), views[0], picked, scale=scale)
        error = distance(found[rows], exact)
    layers = cycle(views)
    return KernelCase(
        kernel,
        num_sequences,
        num_tokens,
        pages.context,
        round(num_sequences * pages.sequence_bytes),
        error,
        None if found is None else lambda: attend_compiled(queries, next(layers), reach, scale=scale),
        lambda: reference.attend(queries, next(layers), reach, scale=scale),
    )


def _some(reach: Reach) -> tuple[Tensor, Reach]:
    """Some queries, spread over all of a step: their numbers, and what they see."""
    counts = reach.query_starts.diff().tolist()
    rows, starts = list[Tensor](), [0]
    for begin, count in zip(reach.query_starts.tolist(), counts, strict=False):
        rows.append(begin + torch.linspace(0, count - 1, min(count, _CHECKED)).long())
        starts.append(starts[-1] + len(rows[-1]))
    chosen = torch.cat(rows)
    return chosen, Reach(torch.tensor(starts, dtype=torch.int32), reach.first[chosen], reach.stop[chosen])


def _append(pages: KernelPages, num_sequences: int, num_tokens: int) -> KernelCase:
    storage, places = pages.storage.newest, pages.slots(num_sequences, num_tokens)
    keys, values = pages.tokens(num_sequences * num_tokens)
    compiled = storage.put(0, keys, values, places[0], None)
    error = None
    if compiled:
        made = storage.read_slots(0, places[0], torch.float32)
        _store_by_torch(storage, 0, keys, values, places[0])
        error = _farther(made, storage.read_slots(0, places[0], torch.float32))
    layers, slots = pages.layers(), cycle(places)
    return KernelCase(
        APPEND,
        num_sequences,
        num_tokens,
        None,
        num_sequences * num_tokens * storage.params.bytes_per_layer_page // storage.params.page_size,
        error,
        (lambda: storage.put(next(layers), keys, values, next(slots), None)) if compiled else None,
        lambda: _store_by_torch(storage, next(layers), keys, values, next(slots)),
    )


def _store_by_torch(storage: PagedStorage, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Encode tokens, or pages, by their codecs, and put them at their slots."""
    sides = zip(storage.shards[0].codecs[layer], (keys, values), strict=True)
    storage.store(layer, [EncodedTokens(*(codec.encode(states) for codec, states in sides))], slots)


def _close(pages: KernelPages, storage: ClosingStorage) -> KernelCase:
    size = pages.shape.params.page_size
    # The last page of every sequence: attention reads it open.
    ids = pages.pages[:, -1].contiguous()
    ring = torch.arange(pages.batch_size).unsqueeze(1) * storage.ring_pages * size
    places = (ring + torch.arange(size)).flatten()
    shard, opened = storage.shards[0], storage.opened.shards[0]
    compiled = shard.close(0, ids, places, opened, None)
    error = None
    if compiled:
        made = storage.read(0, ids, torch.float32)
        _close_by_torch(storage, 0, ids, places)
        error = _farther(made, storage.read(0, ids, torch.float32))
    layers = pages.layers()
    return KernelCase(
        CLOSE,
        pages.batch_size,
        size,
        None,
        len(ids) * pages.shape.params.bytes_per_layer_page,
        error,
        (lambda: shard.close(next(layers), ids, places, opened, None)) if compiled else None,
        lambda: _close_by_torch(storage, next(layers), ids, places),
    )


def _close_by_torch(storage: ClosingStorage, layer: int, ids: Tensor, places: Tensor) -> None:
    states = storage.opened.read_slots(layer, places, torch.float32)
    keys, values = (item.unflatten(0, (len(ids), -1)) for item in states)
    _store_by_torch(storage, layer, keys, values, ids)


def _farther(found: KeysValues, wanted: KeysValues) -> float:
    """The larger distance, of keys or of values."""
    return max(distance(one, other) for one, other in zip(found, wanted, strict=True) if other.numel())


def distance(found: Tensor, wanted: Tensor) -> float:
    """The L2 norm of the difference over that of what is wanted; NaN if anything found is."""
    exact = wanted.double()
    return float((found.double() - exact).norm() / exact.norm())
