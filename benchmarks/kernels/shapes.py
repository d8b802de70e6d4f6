"""What a layer's attention looks like, and the points that are measured."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Heads of one layer."""

    n_q_heads: int
    n_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return "/".join(map(str, self))

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5


LARGE, SMALL, WIDE = Shape(32, 8, 128), Shape(9, 3, 64), Shape(64, 8, 128)
SHAPES = (LARGE, SMALL, WIDE)


class Point(NamedTuple):
    """One decode step: each of `batch` sequences of `context` tokens has one query."""

    batch: int
    context: int


POINTS = tuple(Point(batch, context) for context in (1024, 4096, 16384) for batch in (1, 8, 32))
QUICK_POINTS = (Point(1, 4096), Point(8, 4096))

PAGE_SIZES = (16, 32, 64, 128)
FORMATS = ("bf16", "fp8", "int8", "gauss4", "float32")
ORDERS = ("random", "consecutive")
PROMPT, NEW_TOKENS, APPENDED, STEP = 2048, 512, 4096, 32
"""Tokens of a prompt and of a second one over it; tokens that are appended at once, and sequences of a decode step."""
