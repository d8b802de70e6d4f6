"""Which cached page shares the longest beginning."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from kvcfg.cache.beginnings import Beginning, Beginnings

pages = st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), max_size=12)


def ids_of(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


def common(left: list[int], right: list[int]) -> int:
    return next((n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left))


@given(pages, st.lists(st.integers(-2, 2), max_size=3), st.data())
def test_no_page_shares_more(cached: list[list[int]], own: list[int], data: st.DataObject) -> None:
    kept = Beginnings()
    for page, tokens in enumerate(cached):
        kept.add(page, "parent", ids_of(tokens))
    gone = data.draw(st.sets(st.integers(0, 12)))
    kept.forget(gone)
    shared = {page: common(own, tokens) for page, tokens in enumerate(cached) if page not in gone}
    found = kept.longest("parent", ids_of(own))
    assert (found.num_tokens if found else 0) == max(shared.values(), default=0)
    assert found is None or shared[found.page] == found.num_tokens


def test_pages_after_another_page_do_not_count() -> None:
    kept = Beginnings()
    kept.add(1, "one", ids_of([5, 6]))
    assert kept.longest("other", ids_of([5, 6])) is None
    assert kept.longest("one", ids_of([5, 7])) == Beginning(1, 1)


def test_nothing_is_kept_of_pages_that_are_forgotten() -> None:
    kept = Beginnings()
    kept.add(1, "one", ids_of([5, 6]))
    kept.forget([0, 1])
    assert not kept._after
    assert not kept._entries
