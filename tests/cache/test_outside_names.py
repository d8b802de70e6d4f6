"""Names from outside and their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.cache.outside_names import OutsideNames

WIDTH = 16


def numbers(names: OutsideNames, given: Sequence[object], cached: set[bytes] | None = None) -> list[bytes]:
    together = names.numbered(given, lambda: cached or set())
    return [together[place : place + WIDTH] for place in range(0, len(together), WIDTH)]


def test_equal_names_have_equal_numbers() -> None:
    one, two, again = numbers(OutsideNames(WIDTH, 4), ["one", (2, "two"), "one"])
    assert one == again != two


def test_a_name_of_the_right_width_is_its_own_number() -> None:
    name = bytes(range(WIDTH))
    assert numbers(OutsideNames(WIDTH, 4), [name]) == [name]


def test_a_name_without_a_number_is_not_known() -> None:
    names = OutsideNames(WIDTH, 4)
    (number,) = numbers(names, ["one"])
    assert (names.known("one"), names.known("two")) == (number, b"")


def test_names_that_are_in_use_or_cached_keep_their_number() -> None:
    names = OutsideNames(WIDTH, 4)
    used, cached, gone = numbers(names, ["used", "cached", "gone"])
    names.of["sequence"] = ["used"]
    for start in range(0, 5000, 10):
        numbers(names, range(start, start + 10), {cached})
    assert (names.known("used"), names.known("cached")) == (used, cached)
    assert names.known("gone") != gone
    assert len(names) < 1500
