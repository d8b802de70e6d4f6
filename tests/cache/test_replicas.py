"""Prefixes that another replica holds."""

from __future__ import annotations

from kvcfg.cache.ledger import PageCopy, PageGroup, PageLedger
from kvcfg.cache.replicas import borrow, settle

SIZE = 4


def serve(ledger: PageLedger, name: str, count: int) -> None:
    ledger.claim(name, range(count))
    done = ledger.alloc(name, count)
    ledger.commit(name, count - done.cached_tokens)


def test_pages_are_copied_from_the_replica_that_holds_most() -> None:
    here, short, long = (PageLedger(8, SIZE, [PageGroup("a"), PageGroup("b")]) for _ in range(3))
    serve(short, "x", 5)
    serve(long, "x", 9)
    here.claim("y", range(12))
    here.alloc("y", 12)
    loan = borrow(here, [short, long, short], "y", 12)
    assert loan is not None
    assert loan.lender is long
    assert loan.num_tokens == 8
    assert loan.copies == tuple(PageCopy(group, page, page) for group in (0, 1) for page in (0, 1))
    settle(here, loan)
    assert here.length("y") == 8
    metrics = here.metrics()
    assert (metrics.cache_tokens, metrics.input_tokens, metrics.cached_pages) == (8, 4, 2)
    for ledger in (here, short, long):
        ledger.check_integrity()


def test_a_borrowed_prefix_goes_on_from_what_is_here() -> None:
    here, there = PageLedger(8, SIZE), PageLedger(8, SIZE)
    serve(here, "x", 5)
    serve(there, "x", 13)
    here.claim("y", range(16))
    assert here.alloc("y", 16).cached_tokens == 4
    loan = borrow(here, [there], "y", 12)
    assert loan is not None
    assert [copy.source for copy in loan.copies] == [1, 2]
    assert [copy.target for copy in loan.copies] == list(here.page_table("y").pages[1:3])


def test_what_is_lent_stays_until_it_is_copied() -> None:
    here, there = PageLedger(8, SIZE), PageLedger(3, SIZE)
    serve(there, "x", 9)
    there.release("x")
    here.claim("y", range(12))
    here.alloc("y", 12)
    loan = borrow(here, [there], "y", 12)
    assert loan is not None
    assert there.metrics().used_pages == 2
    settle(here, loan)
    assert there.metrics().used_pages == 0


def test_nobody_lends_what_nobody_has() -> None:
    here, there = PageLedger(8, SIZE), PageLedger(8, SIZE)
    here.claim("y", range(12))
    here.alloc("y", 12)
    assert borrow(here, [there], "y", 12) is None
    assert there.metrics().used_pages == 0


def test_windows_keep_a_prefix_from_being_lent() -> None:
    groups = [PageGroup("far"), PageGroup("near", "sliding_window", 4, 8)]
    here, there = PageLedger(8, SIZE, groups), PageLedger(8, SIZE, groups)
    serve(there, "x", 9)
    here.claim("y", range(12))
    here.alloc("y", 12)
    assert borrow(here, [there], "y", 12) is None
