"""What is done to the numbers of one token in one head before they are quantized, and undone as they are read.

An orthonormal Hadamard matrix spreads an outlier over all head_dim numbers, and makes them nearly normal whatever
they were (QuaRot, Ashkboos et al. 2024). It is its own inverse. Where head_dim is no power of two, each run of
as many numbers as its largest power of two divides is turned by itself: 80 numbers as 5 runs of 16.

A calibrated matrix of each head does the same after it has weighed the directions of keys by what an error in
them costs (`kvcfg calibrate`).

Products of a matrix are the fastest way on CPUs. BLAS libraries may add up in another order where there are few
rows, so these are filled up: a token comes out the same alone and among others.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_FEW_ROWS = 64


class HeadTransform(Protocol):
    """An invertible linear map of heads; a NaN spreads over its own token and head, no further."""

    def apply(self, numbers: Tensor) -> Tensor:
        """Turn `[..., n_heads, dim]` float32 numbers."""

    def undo(self, numbers: Tensor) -> Tensor:
        """Turn them back."""


class Hadamard:
    """The transform for heads of width `dim`."""

    def __init__(self, dim: int) -> None:
        self.width = dim & -dim
        matrix = torch.ones(1, 1)
        while len(matrix) < self.width:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        self._matrix = matrix / self.width**0.5

    def apply(self, numbers: Tensor) -> Tensor:
        """Turn `[..., dim]` float32 numbers; a NaN spreads over its own run."""
        self._matrix = self._matrix.to(numbers.device)
        return _product(numbers.reshape(-1, self.width), self._matrix).view(numbers.shape)

    def undo(self, numbers: Tensor) -> Tensor:
        """Turn them back, which is the same."""
        return self.apply(numbers)


class HeadMatrices:
    """A matrix for each head: row vectors times `matrices` `[n_heads, dim, dim]`, which must be invertible."""

    def __init__(self, matrices: Tensor) -> None:
        exact = matrices.double()
        self._forward = list(exact.float().unbind())
        self._backward = list(torch.linalg.inv(exact).float().unbind())

    def apply(self, numbers: Tensor) -> Tensor:
        """Turn `[..., n_heads, dim]` float32 numbers."""
        return _by_head(numbers, self._forward)

    def undo(self, numbers: Tensor) -> Tensor:
        """Turn them back."""
        return _by_head(numbers, self._backward)


def _by_head(numbers: Tensor, matrices: list[Tensor]) -> Tensor:
    turned = torch.empty_like(numbers)
    for head, matrix in enumerate(matrices):
        rows = numbers[..., head, :]
        turned[..., head, :] = _product(rows.reshape(-1, rows.shape[-1]), matrix.to(rows.device)).view(rows.shape)
    return turned


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    missing = max(0, _FEW_ROWS - len(rows))
    if not missing:
        return rows @ matrix
    return (torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) @ matrix)[: len(rows)]
