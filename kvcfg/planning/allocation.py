"""Which of several formats each of many sides takes, so that few bytes lose little.

What a choice costs in bytes and in KL adds up over all sides, so this is a knapsack with one choice of each. All
choices that no other beats in both bytes and KL are kept, side after side (dynamic programming over the Pareto front,
as Nemhauser and Ullmann do): exact, and short, since pages of one model differ by multiples of few sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class FormatCost(NamedTuple):
    """What one side costs in one format.

    Attributes:
        num_bytes: bytes of a page.
        kl: mean KL divergence that it adds, in nats.
    """

    num_bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """One choice for every side.

    Attributes:
        num_bytes: bytes of a page over all sides.
        kl: KL divergence that they add together, in nats.
        chosen: of each side, the place of its format among those it could take.
    """

    num_bytes: int
    kl: float
    chosen: tuple[int, ...]


class _Partial(NamedTuple):
    """Choices of the first sides: of the last of them, and a link to those before."""

    num_bytes: int
    kl: float
    choice: int
    before: _Partial | None


def best_allocations(sides: Sequence[Sequence[FormatCost]]) -> list[Allocation]:
    """All allocations that no other beats.

    Args:
        sides: what each format of each side costs.

    Returns:
        From the fewest bytes to the least KL; each has more bytes and less KL than the one before.
    """
    front = [_Partial(0, 0.0, 0, None)]
    for costs in sides:
        grown = [
            _Partial(before.num_bytes + cost.num_bytes, before.kl + cost.kl, choice, before)
            for before in front
            for choice, cost in enumerate(costs)
        ]
        front = list(_unbeaten(grown))
    return [Allocation(item.num_bytes, item.kl, tuple(_chosen(item))[::-1]) for item in front]


def fewest_bytes(allocations: Sequence[Allocation], max_kl: float) -> Allocation | None:
    """Of the best allocations the one of fewest bytes that adds at most `max_kl`; None if none does."""
    return next((item for item in allocations if item.kl <= max_kl), None)


def least_kl(allocations: Sequence[Allocation], max_bytes: int) -> Allocation | None:
    """Of the best allocations the one of least KL that takes at most `max_bytes`; None if none does."""
    return next((item for item in reversed(allocations) if item.num_bytes <= max_bytes), None)


def _unbeaten(items: list[_Partial]) -> Iterator[_Partial]:
    least = float("inf")
    for item in sorted(items, key=lambda item: item[:2]):
        if item.kl < least:
            least = item.kl
            yield item


def _chosen(item: _Partial) -> Iterator[int]:
    """The choices, the last side's first."""
    while item.before is not None:
        yield item.choice
        item = item.before
