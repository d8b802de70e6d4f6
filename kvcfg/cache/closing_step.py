"""A step of a layer group whose pages close: what is read closed, what is read open, and what closes in it.

A query at position t reads every page that was closed before it from storage, and later tokens, its own included,
as open pages store them. With drafts that may be taken back, a page closes `horizon` tokens after it is full:

    closed(t) = pages whose last token is before t - horizon

So what a query reads does not depend on how a prompt is cut into steps. A step that goes on over the end of a
page has several segments: queries that read the same pages closed.

Open pages of a sequence are a ring in a small storage of their own: token n is in slot `n % ring tokens` of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.cache.step import GroupStep, Span, whole_spans


class Segment(NamedTuple):
    """Queries of a step that read the same pages closed: positions `[start, stop)`, and the tokens read closed."""

    start: int
    stop: int
    closed: int


class Closing(NamedTuple):
    """Pages of one sequence that close in a step; their tokens are its first open ones.

    Attributes:
        sequence: number in the batch.
        row: where its ring is.
        end: index in the sequence of the page after them.
        pages: `[n]` int64.
    """

    sequence: int
    row: int
    end: int
    pages: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosingStep(GroupStep):
    """Where a group whose pages close reads and writes.

    `slots` and `stored` are those of the tokens that rings have room for, so that tokens of a page that closes in the
    step can still be read open: the step's queries do. `in_place` where that is so for all of them.

    Attributes:
        open_slots: `[n]` int64, slots of the open tokens before the step, sequence after sequence.
        opened: per sequence, how many there are.
        closing: pages that close in the step.
        segments: per sequence, its queries by what they read closed.
        closed: int32 `[num_sequences]`, tokens of each sequence that were closed before the step.
        open_rows: int32 `[num_sequences]`, first page of each sequence's ring among open pages.
        ring_tokens: slots of a ring.
    """

    open_slots: Tensor
    opened: tuple[Span, ...]
    closing: tuple[Closing, ...]
    segments: tuple[tuple[Segment, ...], ...]
    closed: Tensor
    open_rows: Tensor
    ring_tokens: int


def closing_step(
    pages: Tensor,
    rows: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    closed: Sequence[int],
    *,
    page_size: int,
    ring_pages: int,
    horizon: int,
) -> ClosingStep:
    """Lay out a step.

    Args:
        pages: `[batch_size, columns]` int64, the sequences' pages.
        rows: per sequence its row, which says where its ring is.
        starts: per sequence, tokens stored before.
        counts: per sequence, tokens of the step.
        closed: per sequence, pages closed before.
        page_size: tokens in a page.
        ring_pages: open pages of a sequence.
        horizon: tokens that may be taken back after the step.
    """
    past, open_slots, slots, stored = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    closing, runs, ring, offset = list[Closing](), list[tuple[Segment, ...]](), ring_pages * page_size, 0
    in_place = True
    for number, (row, start, count, before) in enumerate(zip(rows, starts, counts, closed, strict=True)):
        after = max(before, (start + count - horizon) // page_size)
        past.append(pages[number, :before])
        open_slots.append(row * ring + torch.arange(before * page_size, start) % ring)
        if after > before:
            closing.append(Closing(number, row, after, pages[number, before:after]))
        kept = torch.arange(max(start, start + count - ring), start + count)
        slots.append(row * ring + kept % ring)
        stored.append(kept - start + offset)
        runs.append(segments(start, count, before, page_size, horizon))
        in_place = in_place and len(runs[-1]) <= 1 and start + count - before * page_size <= ring
        offset += count
    whole = [before * page_size for before in closed]
    return ClosingStep(
        past_pages=torch.cat(past),
        past=whole_spans(whole),
        fresh=whole_spans(counts),
        slots=torch.cat(slots),
        stored=torch.cat(stored),
        open_slots=torch.cat(open_slots),
        opened=whole_spans([start - tokens for start, tokens in zip(starts, whole, strict=True)]),
        closing=tuple(closing),
        segments=tuple(runs),
        in_place=in_place,
        closed=torch.tensor(whole, dtype=torch.int32),
        open_rows=torch.tensor([row * ring_pages for row in rows], dtype=torch.int32),
        ring_tokens=ring,
    )


def segment_from(position: int, closed: int, page_size: int, horizon: int) -> Segment:
    """The longest run of queries from a position on that read the same pages closed.

    Args:
        position: of the first query.
        closed: pages that are closed in any case.
        page_size: tokens in a page.
        horizon: tokens that may be taken back.
    """
    pages = max(closed, (position - horizon) // page_size)
    return Segment(position, (pages + 1) * page_size + horizon, pages * page_size)


def segments(start: int, count: int, closed: int, page_size: int, horizon: int) -> tuple[Segment, ...]:
    """Runs of `count` queries from a position on that read the same pages closed; see `segment_from`."""
    runs, position, stop = list[Segment](), start, start + count
    while position < stop:
        run = segment_from(position, closed, page_size, horizon)
        runs.append(run._replace(stop=min(stop, run.stop)))
        position = run.stop
    return tuple(runs)
