"""The matrix by which stored keys of one head lose least in scores, in closed form.

A score is a query times a key. Of keys, A is the second moment of what is stored (keys less the mean of their page),
of the queries that read them B. Stored as k M with an error of the same size e in every direction, a key is read with
the error e M^-1, and scores are off by

    error of scores = |e|^2 tr(M^-1 B M^-1) / d         |e|^2 follows the energy of k M, tr(M A M)

The product of both traces is least where the two matrices are equal, which they are for

    M = (A^-1 # B)^(1/2)        A^-1 # B = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2, the geometric mean of the two

and its value there is (tr (A^1/2 B A^1/2)^1/2)^2, where keys stored as they are cost tr(A) tr(B). A Hadamard matrix
after M makes the error the same in every direction, and costs nothing since it is orthonormal.

It is RoPE-pair balancing with all directions in place of pairs, and needs the moments in place of the weights.
Related: OSCAR (arXiv 2605.17757), which turns and weighs keys by moments of queries; QuaRot (Ashkboos et al. 2024),
for the Hadamard matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcfg.formats.transforms import Hadamard

_FLOOR = 1e-4
"""Of the mean eigenvalue: what is added to every direction, so that one that a short text never takes stays sane."""

_SMALLEST = 1e-9
"""Of the largest eigenvalue: no direction counts for less."""


def key_transforms(keys: Tensor, queries: Tensor) -> Tensor:
    """What keys of each head are multiplied by, as row vectors, before they are quantized.

    A head without energy in its keys or its queries gets the Hadamard matrix alone.

    Args:
        keys: `[n_kv_heads, head_dim, head_dim]` float64, second moments of keys less the mean of their page.
        queries: the same of the queries that read them.

    Returns:
        `[n_kv_heads, head_dim, head_dim]` float64, invertible.
    """
    dim = keys.shape[-1]
    one = torch.eye(dim, dtype=keys.dtype, device=keys.device)
    counts = ((_energy(keys) > 0) & (_energy(queries) > 0))[:, None, None]
    moments = (torch.where(counts, moment + one * _FLOOR * _energy(moment)[:, None, None] / dim, one)
               for moment in (keys, queries))  # fmt: skip
    return balancing_root(*moments) @ hadamard(dim).to(keys)


def balancing_root(keys: Tensor, queries: Tensor) -> Tensor:
    """The symmetric M with M A M = M^-1 B M^-1, of positive moments A of keys and B of queries `[..., dim, dim]`."""
    root, inverse = _power(keys, 0.5), _power(keys, -0.5)
    return _power(inverse @ _power(root @ queries @ root, 0.5) @ inverse, 0.5)


def score_error(keys: Tensor, queries: Tensor, transforms: Tensor) -> Tensor:
    """Error energy of scores `[n_kv_heads]` that stored keys cause, in units that all transforms share.

    Args:
        keys: second moments of keys less the mean of their page, as above.
        queries: second moments of the queries that read them.
        transforms: `[n_kv_heads, head_dim, head_dim]`, what keys are multiplied by; spreads them evenly.
    """
    inverse = torch.linalg.inv(transforms)
    return _energy(transforms.mT @ keys @ transforms) * _energy(inverse @ queries @ inverse.mT)


def gained_bits(keys: Tensor, queries: Tensor, transforms: Tensor) -> Tensor:
    """Bits per number `[n_kv_heads]` by which keys without `transforms` would have to be finer to cost as little."""
    plain, balanced = _energy(keys) * _energy(queries), score_error(keys, queries, transforms)
    return torch.where((plain > 0) & (balanced > 0), plain / balanced, 1.0).log2() / 2


def hadamard(dim: int) -> Tensor:
    """The matrix `[dim, dim]` float64 that `transform=hadamard` multiplies by."""
    return Hadamard(dim).apply(torch.eye(dim)).double()


def _energy(moments: Tensor) -> Tensor:
    return moments.diagonal(dim1=-2, dim2=-1).sum(-1)


def _power(moments: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive matrices."""
    values, directions = torch.linalg.eigh((moments + moments.mT) / 2)
    values = values.clamp(min=values.amax(-1, keepdim=True) * _SMALLEST)
    power: Tensor = (directions * values.pow(exponent).unsqueeze(-2)) @ directions.mT
    return power
