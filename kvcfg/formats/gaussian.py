"""Codebooks for a normal distribution: the levels with the least mean squared error that 2**b levels can have.

Such a codebook (Lloyd 1957, Max 1960) meets two conditions. A number goes to the nearest level, so thresholds lie
in the middle between levels; and a level is the mean of what goes to it. With density p and distribution P

    t_i = (c_i + c_(i+1)) / 2                                        t_0 = -inf, t_n = inf
    r_i = p(t_(i-1)) - p(t_i) - c_i * (P(t_i) - P(t_(i-1))) = 0

since the integral of x p(x) is -p(x). The r_i are solved for the c_i by Newton's method. r_i depends on its own
level and its two neighbours only, so a step is one sweep over a tridiagonal system:

    dr_i / dc_(i+1) = p(t_i) (c_(i+1) - c_i) / 4
    dr_i / dc_(i-1) = p(t_(i-1)) (c_i - c_(i-1)) / 4
    dr_i / dc_i     = the sum of both - (P(t_i) - P(t_(i-1)))

It starts at the quantiles of a normal distribution of variance 3, which is what the levels tend to as they
become many (Panter and Dite 1951). Newton's method would throw the outermost levels far out from there, so that a
few of Lloyd's own steps, each level to the mean of its cell, come first; it then takes about five.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt
from statistics import NormalDist

from kvcfg.formats import Format
from kvcfg.formats.codebook import Codebook

_LLOYD_STEPS = 10
_NEWTON_STEPS = 10
_DECIMALS = 6


class Gaussian(Codebook):
    """Stores numbers as the nearest level of the normal distribution's best codebook; none of them is 0."""

    def __init__(self, element_format: Format) -> None:
        super().__init__(element_format.bits, gaussian_levels(element_format.bits))


@cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels for numbers of mean 0 and variance 1, in ascending order.

    They are rounded to 6 decimals, so that every machine has the same ones.
    """
    count = 2**bits
    wide = NormalDist(0, sqrt(3))
    levels = [wide.inv_cdf((index + 0.5) / count) for index in range(count)]
    for _ in range(_LLOYD_STEPS):
        levels = [mean / share for mean, share in zip(*_cells(levels)[:2], strict=True)]
    for _ in range(_NEWTON_STEPS):
        levels = [level + step for level, step in zip(levels, _newton_step(levels), strict=True)]
    return tuple(round((level - mirrored) / 2, _DECIMALS) for level, mirrored in zip(levels, levels[::-1], strict=True))


def _cells(levels: list[float]) -> tuple[list[float], list[float], list[float]]:
    """Of what goes to each level the mean times its share, and its share; and the density at each threshold."""
    thresholds = [-inf, *((low + high) / 2 for low, high in pairwise(levels)), inf]
    density = [exp(-t * t / 2) / sqrt(2 * pi) for t in thresholds]
    below = [erf(t / sqrt(2)) / 2 for t in thresholds]
    return [low - high for low, high in pairwise(density)], [high - low for low, high in pairwise(below)], density


def _newton_step(levels: list[float]) -> list[float]:
    """What to add to the levels so that each comes closer to the mean of its own cell."""
    means, shares, density = _cells(levels)
    rest = [mean - level * share for mean, level, share in zip(means, levels, shares, strict=True)]
    coupling = [p * (high - low) / 4 for p, (low, high) in zip(density[1:-1], pairwise(levels), strict=True)]
    both_sides = map(sum, pairwise([0.0, *coupling, 0.0]))
    diagonal = [both - share for both, share in zip(both_sides, shares, strict=True)]
    return _solve(coupling, diagonal, [-item for item in rest])


def _solve(beside: list[float], diagonal: list[float], right: list[float]) -> list[float]:
    """The solution of a symmetric tridiagonal system (Thomas' algorithm)."""
    diagonal, right = list(diagonal), list(right)
    for i, item in enumerate(beside, start=1):
        factor = item / diagonal[i - 1]
        diagonal[i] -= factor * item
        right[i] -= factor * right[i - 1]
    solution = [right[-1] / diagonal[-1]]
    for item, pivot, value in zip(beside[::-1], diagonal[-2::-1], right[-2::-1], strict=True):
        solution.append((value - item * solution[-1]) / pivot)
    return solution[::-1]
