"""What must hold before any time is taken: outputs close to float64 on the stored numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from reference import attention
from shapes import Shape
from torch import Tensor

from kvcfg.evaluation.kernel_cases import distance

BOUNDS = {"float32": 1e-5, "kvcfg": 4e-3, "vllm": 2e-2}
"""Relative L2 errors that are let pass: of float32 queries, and of either side's bfloat16, whose rounding alone is
up to 2e-3 of an output. vLLM multiplies in bfloat16 too."""


class Check(NamedTuple):
    """One kernel's error.

    Attributes:
        case: decode, append or prefill.
        side: kvcfg or vllm.
        format: how keys and values are stored.
        page_size: tokens per page.
        shape: the heads.
        error: relative L2 norm.
        bound: what it may be.
    """

    case: str
    side: str
    format: str
    page_size: int
    shape: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether it is within its bound; a NaN is not."""
        return self.error <= self.bound


def check(
    case: str,
    side: str,
    name: str,
    page_size: int,
    shape: Shape,
    found: Tensor,
    queries: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
) -> Check:
    """Check one query per sequence, each over all of its tokens; the worst sequence counts.

    Args:
        case: decode, append or prefill.
        side: kvcfg or vllm.
        name: how keys and values are stored.
        page_size: tokens per page.
        shape: the heads.
        found: `[num_sequences, n_q_heads, head_dim]`.
        queries: the same shape.
        states: keys and values `[num_tokens, n_kv_heads, head_dim]` of each sequence, as stored.
    """
    errors = [
        distance(output, attention(query.unsqueeze(0), keys, values, [len(keys)], shape)[0])
        for output, query, (keys, values) in zip(found, queries, states, strict=True)
    ]
    return Check(case, side, name, page_size, str(shape), worst(errors), bound_of(side, name))


def bound_of(side: str, name: str) -> float:
    """What an error of attention may be."""
    return BOUNDS.get(name, BOUNDS[side])


def worst(errors: Sequence[float]) -> float:
    """The largest one; NaN if there is one."""
    return float(torch.tensor(errors, dtype=torch.float64).max())
