"""One step of sequences of any lengths, one after the other in a single row, as the layers of a model meet it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from kvcfg.attention import Reach, causal
from kvcfg.cache.closing_step import ClosingStep
from kvcfg.cache.step import Step
from kvcfg.cache.view import LayerView


class PackedBatch:
    """A step, and what each of its queries sees.

    Args:
        step: from the cache engine.
        alone: whether attention takes every query as a sequence of its own, so that its result does not depend on
            what else is in the step.

    Attributes:
        num_tokens: tokens of all sequences.
        positions: of each token in its sequence.
    """

    def __init__(self, step: Step, *, alone: bool = False) -> None:
        self.step, self.alone = step, alone
        self.num_tokens = sum(step.num_tokens)
        self.positions = [
            start + place for start, count in zip(step.starts, step.num_tokens, strict=True) for place in range(count)
        ]
        self._reaches: dict[tuple[int | None, bool], Reach] = {}
        self._tables: dict[int, Tensor] = {}

    @cached_property
    def sequence_of(self) -> Tensor:
        """Per token, the number of its sequence: `[num_tokens]` int64."""
        counts = torch.tensor(self.step.num_tokens)
        return torch.arange(len(counts)).repeat_interleave(counts)

    def reach(self, window: int | None, *, chunked: bool) -> Reach:
        """Which tokens each query sees in a layer with this window; made once a step."""
        key = (window, chunked)
        if key not in self._reaches:
            starts, counts = self.step.starts, self.step.num_tokens
            if self.alone:
                starts, counts = tuple(self.positions), (1,) * self.num_tokens
            self._reaches[key] = causal(starts, counts, window, chunked=chunked)
        return self._reaches[key]

    def seen_by_queries(self, view: LayerView) -> LayerView:
        """A layer of the step as attention is to read it: as it is, or with a row of the page table for each query."""
        if not self.alone:
            return view
        step = view.step
        if isinstance(step, ClosingStep):
            step = self._closing(step)
        return replace(view, tables=view.tables[self.sequence_of], step=step)

    def _closing(self, step: ClosingStep) -> ClosingStep:
        return replace(step, closed=step.closed[self.sequence_of], open_rows=step.open_rows[self.sequence_of])
