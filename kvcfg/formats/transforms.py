"""What is done to the numbers of one token in one head before they are quantized, and undone as they are read.

An orthonormal Hadamard matrix spreads an outlier over all head_dim numbers, and makes them nearly normal whatever
they were (QuaRot, Ashkboos et al. 2024). It is its own inverse. Where head_dim is no power of two, each run of
as many numbers as its largest power of two divides is turned by itself: 80 numbers as 5 runs of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW_ROWS = 64


class Hadamard:
    """The transform for heads of width `dim`; `apply` both does and undoes it.

    A matrix product is the fastest way on CPUs. BLAS libraries may add up in another order where there are few
    rows, so these are filled up: a token comes out the same alone and among others.
    """

    def __init__(self, dim: int) -> None:
        self.width = dim & -dim
        matrix = torch.ones(1, 1)
        while len(matrix) < self.width:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        self._matrix = matrix / self.width**0.5

    def apply(self, numbers: Tensor) -> Tensor:
        """Turn `[..., dim]` float32 numbers; a NaN spreads over its own run."""
        self._matrix = self._matrix.to(numbers.device)
        rows = numbers.reshape(-1, self.width)
        missing = max(0, _FEW_ROWS - len(rows))
        if missing:
            rows = torch.cat((rows, rows.new_zeros(missing, self.width)))
        turned: Tensor = rows @ self._matrix
        return turned[: len(turned) - missing].view(numbers.shape)
