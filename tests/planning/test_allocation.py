"""The best allocations against all allocations there are."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from kvcfg.planning.allocation import Allocation, FormatCost, best_allocations, fewest_bytes, least_kl

COSTS = st.builds(FormatCost, st.integers(1, 12), st.integers(0, 50).map(float))
SIDES = st.lists(st.lists(COSTS, min_size=1, max_size=4), min_size=1, max_size=5)


def all_allocations(sides: list[list[FormatCost]]) -> list[tuple[int, float]]:
    return [(sum(cost.num_bytes for cost in chosen), sum(cost.kl for cost in chosen)) for chosen in product(*sides)]


@given(SIDES, st.integers(0, 250))
def test_fewest_bytes_are_those_of_the_best_of_all(sides: list[list[FormatCost]], max_kl: int) -> None:
    within = [num_bytes for num_bytes, kl in all_allocations(sides) if kl <= max_kl]
    found = fewest_bytes(best_allocations(sides), max_kl)
    assert (None if found is None else found.num_bytes) == min(within, default=None)


@given(SIDES, st.integers(0, 60))
def test_least_kl_is_that_of_the_best_of_all(sides: list[list[FormatCost]], max_bytes: int) -> None:
    within = [kl for num_bytes, kl in all_allocations(sides) if num_bytes <= max_bytes]
    found = least_kl(best_allocations(sides), max_bytes)
    assert (None if found is None else found.kl) == min(within, default=None)


@given(SIDES)
def test_choices_add_up_to_what_they_are_said_to_cost(sides: list[list[FormatCost]]) -> None:
    for found in best_allocations(sides):
        chosen = [costs[choice] for costs, choice in zip(sides, found.chosen, strict=True)]
        assert sum(cost.num_bytes for cost in chosen) == found.num_bytes
        assert sum(cost.kl for cost in chosen) == found.kl


@given(SIDES)
def test_more_bytes_never_lose_more(sides: list[list[FormatCost]]) -> None:
    best = best_allocations(sides)
    assert all(one.num_bytes < two.num_bytes and one.kl > two.kl for one, two in pairwise(best))


def test_sixty_sides_with_sizes_of_one_unit_take_few_steps() -> None:
    sides = [[FormatCost(bits, (side + 1) * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)] for side in range(60)]
    best = best_allocations(sides)
    assert len(best) <= 60 * 6 + 1
    middle = least_kl(best, 4 * 60)
    assert middle is not None
    assert middle.num_bytes == 240
    assert list(middle.chosen) == sorted(middle.chosen)  # sides that bear less get no fewer bits


def test_nothing_is_found_where_nothing_keeps_to_the_limit() -> None:
    best = [Allocation(2, 1.0, (0,))]
    assert fewest_bytes(best, max_kl=0.5) is None
    assert least_kl(best, max_bytes=1) is None
