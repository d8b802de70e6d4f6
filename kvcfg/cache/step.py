"""One step of a batch: which tokens it computes, what their queries see of the past, and where they are stored.

A step is laid out once and then used by every layer. Tokens of a batch stand one sequence after the other, so
sequences of any lengths go together: `[num_tokens, n_kv_heads, dim]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.cache.page_tables import BatchTables, PageTables
from kvcfg.cache.pages import PageTable, SeqId
from kvcfg.params import KVCacheParams
from kvcfg.units import ceil_div


class Span(NamedTuple):
    """Tokens of one sequence among packed ones: `length` of them from `offset` on, in `num_rows` that are its own."""

    offset: int
    length: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class GroupStep:
    """Where one layer group reads and writes.

    Attributes:
        past_pages: `[n]` int64, the pages that are seen, sequence after sequence.
        past: per sequence, which of their tokens are seen.
        fresh: per sequence, its tokens of the step.
        slots: `[num_stored]` int64, where tokens of the step are stored.
        stored: `[num_stored]` int64, which of them; None = all. A windowed group keeps only those that a later
            query can see.
        in_place: whether all that the step's queries see is in the pages once its tokens are stored. A windowed
            group may need pages for new tokens that hold what the first queries of the step still see.
    """

    past_pages: Tensor
    past: tuple[Span, ...]
    fresh: tuple[Span, ...]
    slots: Tensor
    stored: Tensor | None
    in_place: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of some sequences of one replica.

    Attributes:
        seq_ids: the batch.
        starts: per sequence, tokens stored before.
        num_tokens: per sequence, tokens of the step.
        groups: per layer group where it reads and writes; None for groups without pages.
        shards: per tensor parallel shard the page tables and lengths, for kernels that read pages themselves.
            They stay valid until the next step but one is laid out.
        max_lengths: `[1, 2]` uint32 on the host: the most tokens of a sequence in this step, and the longest
            sequence with them.
    """

    seq_ids: tuple[SeqId, ...]
    starts: tuple[int, ...]
    num_tokens: tuple[int, ...]
    groups: tuple[GroupStep | None, ...]
    shards: tuple[BatchTables, ...]
    max_lengths: Tensor


def first_seen(group: KVCacheParams, position: int) -> int:
    """Position of the first token that a query at `position` sees."""
    if group.window is None:
        return 0
    return position // group.window * group.window if group.kind == "chunked" else max(0, position - group.window + 1)


def growing_step(
    tables: PageTables, group: int, page_size: int, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]
) -> GroupStep:
    """Where a group that keeps everything reads and writes."""
    filled = [ceil_div(start, page_size) for start in starts]
    spans = tuple(Span(0, start, pages * page_size) for start, pages in zip(starts, filled, strict=True))
    held, columns = torch.tensor(rows), torch.arange(max(filled))
    past = tables.pages(group, held.unsqueeze(1), columns)
    in_use = columns < torch.tensor(filled).unsqueeze(1)
    positions = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    pages = tables.pages(group, held.repeat_interleave(torch.tensor(counts)), positions // page_size)
    return GroupStep(past[in_use], spans, whole_spans(counts), pages * page_size + positions % page_size, None)


def windowed_step(
    group: KVCacheParams,
    null_page: int,
    befores: Sequence[PageTable],
    afters: Sequence[PageTable],
    starts: Sequence[int],
    counts: Sequence[int],
    columns: int,
) -> GroupStep:
    """Where a windowed group reads and writes.

    Args:
        group: the group.
        null_page: the page that stands where nothing is stored.
        befores: per sequence its pages before the step was allocated; there the past is read.
        afters: per sequence its pages since.
        starts: per sequence, tokens stored before.
        counts: per sequence, tokens of the step.
        columns: of the group's page table, in which page n stands in column `n % columns`.
    """
    size = group.page_size
    past, spans, given_up, fits = list[int](), list[Span](), set[int](), True
    slots, stored, offset = list[Tensor](), list[Tensor](), 0
    for before, after, start, count in zip(befores, afters, starts, counts, strict=True):
        seen = first_seen(group, start)
        first, end = seen // size, ceil_div(start, size)
        pages = before.pages[first - before.first : end - before.first]
        past += pages
        given_up.update(pages[: max(0, after.first - first)])
        fits = fits and ceil_div(start + count, size) - first <= columns
        spans.append(Span(seen - first * size, start - seen, len(pages) * size))
        begin = max(start, after.first * size)
        held = torch.tensor(after.pages[begin // size - after.first :], dtype=torch.int64)
        places = _slots(held, begin, max(0, start + count - begin), size)
        kept = places // size != null_page
        slots.append(places[kept])
        stored.append(torch.arange(offset + begin - start, offset + count)[kept])
        offset += count
    seen_pages, written = torch.tensor(past, dtype=torch.int64), torch.cat(slots)
    in_place = fits and len(written) == sum(counts) and given_up.isdisjoint((written // size).tolist())
    return GroupStep(seen_pages, tuple(spans), whole_spans(counts), written, torch.cat(stored), in_place)


def whole_spans(counts: Sequence[int]) -> tuple[Span, ...]:
    """Spans of sequences that are packed without anything between."""
    return tuple(Span(0, count, count) for count in counts)


def _slots(pages: Tensor, start: int, count: int, page_size: int) -> Tensor:
    """Slots of `count` tokens from `start` on, which lie in `pages` from their first one on."""
    positions = torch.arange(start, start + count)
    return pages[positions // page_size - start // page_size] * page_size + positions % page_size
