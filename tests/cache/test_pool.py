"""Page ids: handed out, counted, handed out again."""

from __future__ import annotations

import pytest

from kvcfg.cache.pool import PagePool


def pool_of(num_pages: int, eviction: str = "lru") -> PagePool:
    return PagePool(num_pages, [None] * num_pages, eviction)


def test_pages_are_handed_out_in_ascending_order_at_first() -> None:
    pool = pool_of(5)
    assert pool.take(2) + pool.take(3) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_pages_that_were_never_used_go_before_those_that_became_free() -> None:
    pool = pool_of(5)
    pool.drop(pool.take(3))
    assert pool.take(5) == [3, 4, 0, 1, 2]


def test_freed_pages_line_up_in_the_order_in_which_they_are_dropped() -> None:
    pool = pool_of(4)
    pool.take(4)
    pool.drop([2, 0])
    pool.drop([3])
    assert pool.free_pages() == [2, 0, 3]


def test_a_page_is_free_only_when_the_last_reference_goes() -> None:
    pool = pool_of(2)
    (page,) = pool.take(1)
    pool.hold([page])
    assert pool.drop([page]) == []
    assert pool.references(page) == 1
    assert pool.drop([page]) == [page]


def test_a_page_taken_back_goes_to_the_end_of_the_line() -> None:
    pool = pool_of(3)
    pool.drop(pool.take(3))
    assert pool.hold([0]) == 1
    assert pool.free_pages() == [1, 2]
    pool.drop([0])
    assert pool.take(3) == [1, 2, 0]


def test_a_page_named_twice_is_counted_twice() -> None:
    pool = pool_of(1)
    pool.drop(pool.take(1))
    assert pool.hold([0, 0]) == 1
    assert pool.references(0) == 2


@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo", "priority"])
def test_a_hot_page_does_not_make_the_line_grow(eviction: str) -> None:
    keys: list[str | None] = ["a", "b", None]
    pool = PagePool(3, keys, eviction)
    pool.take(3)
    pool.cached([0, 1])
    pool.drop([0, 1, 2])
    for _ in range(20_000):
        pool.hold([0])
        pool.drop([0])
    order = pool._order
    waiting = sum(len(line) for line in (getattr(order, "_batches", ()), getattr(order, "_heap", ())))
    assert waiting < 5_000
    pool.check_integrity([0, 0, 0])
    assert sorted(pool.take(3)) == [0, 1, 2]


def test_integrity_finds_a_reference_too_many() -> None:
    pool = pool_of(2)
    pool.take(1)
    with pytest.raises(AssertionError, match="reference counts differ"):
        pool.check_integrity([2, 0])


def test_a_pool_gives_no_more_than_it_has() -> None:
    pool = pool_of(2)
    with pytest.raises(AssertionError, match="3 pages taken, 2 are free"):
        pool.take(3)


def test_dropping_a_free_page_is_a_bug() -> None:
    pool = pool_of(2)
    with pytest.raises(AssertionError, match="dropped while free"):
        pool.drop([1])
