"""Which tokens each query of a step sees.

A step's queries stand one sequence after the other. One at position p sees tokens first .. p of its sequence:

    everything        first = 0
    sliding window    first = p - window + 1, or 0
    chunked           first = p rounded down to a multiple of the window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcfg.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Reach:
    """Made once a step and used by every layer that has the same window.

    Attributes:
        query_starts: int32 `[num_sequences + 1]`, first query of each sequence, and the end.
        first: int32 `[num_queries]`, a query sees tokens `[first, stop)` of its sequence; none where it is empty.
        stop: int32 `[num_queries]`.
    """

    query_starts: Tensor
    first: Tensor
    stop: Tensor


def causal(
    starts: Sequence[int],
    counts: Sequence[int],
    window: int | None = None,
    *,
    chunked: bool = False,
    skip: Sequence[int] | None = None,
) -> Reach:
    """Every query sees the tokens up to its own.

    Args:
        starts: per sequence, tokens stored before the step.
        counts: per sequence, its queries: the tokens of the step.
        window: tokens that a query sees, its own included; None = all.
        chunked: whether windows begin at multiples of `window` instead of moving along.
        skip: per sequence, tokens at its start that no query sees (padding); None = none.

    Raises:
        ShapeError: if these are not of the same number of sequences.
    """
    if len(starts) != len(counts) or (skip is not None and len(skip) != len(starts)):
        raise ShapeError(
            f"starts, counts and skip must name the same sequences, got {len(starts)}, {len(counts)} and "
            f"{'none' if skip is None else len(skip)}"
        )
    numbers = torch.tensor(counts, dtype=torch.int32)
    query_starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(numbers, 0, out=query_starts[1:])
    shift = torch.tensor(starts, dtype=torch.int32) - query_starts[:-1]
    position = torch.arange(sum(counts), dtype=torch.int32) + shift.repeat_interleave(numbers)
    first = torch.zeros_like(position)
    if window is not None:
        first = position // window * window if chunked else (position - window + 1).clamp_(min=0)
    if skip is not None:
        first = torch.maximum(first, torch.tensor(skip, dtype=torch.int32).repeat_interleave(numbers))
    return Reach(query_starts, first, position + 1)
