"""Which cached page goes first."""

from __future__ import annotations

import pytest

from kvcfg.cache.eviction import POLICIES
from kvcfg.cache.ledger import PageLedger
from kvcfg.errors import ConfigError

PAGE = 4


def prompt(number: int) -> list[int]:
    """Two pages and one token; no two numbers share a page."""
    return [number] * (2 * PAGE + 1)


def serve(ledger: PageLedger, number: int, priority: int = 0) -> int:
    """A request from claim to release; its cached tokens."""
    ids = prompt(number)
    ledger.claim(number, ids, priority=priority)
    done = ledger.alloc(number, len(ids))
    ledger.commit(number, len(ids) - done.cached_tokens)
    ledger.release(number)
    return done.cached_tokens


def kept(ledger: PageLedger, numbers: list[int]) -> list[int]:
    """Which prompts would be found whole now."""
    found = []
    for number in numbers:
        ledger.claim("probe", prompt(number))
        if ledger.forecast("probe", len(prompt(number))).cached_tokens == 2 * PAGE:
            found.append(number)
        ledger.release("probe")
    return found


def test_lru_gives_up_what_was_not_used_for_longest() -> None:
    ledger = PageLedger(7, PAGE)
    for number in (1, 2, 1, 3):
        serve(ledger, number)
    assert kept(ledger, [1, 2, 3]) == [1, 3]


def test_fifo_gives_up_what_was_cached_first() -> None:
    ledger = PageLedger(7, PAGE, eviction="fifo")
    for number in (1, 2, 1, 3, 4):
        serve(ledger, number)
    assert kept(ledger, [1, 2, 3, 4]) == [2, 3, 4]


def test_lfu_gives_up_what_was_hit_least() -> None:
    ledger = PageLedger(7, PAGE, eviction="lfu")
    for number in (1, 1, 2, 3, 4):
        serve(ledger, number)
    assert kept(ledger, [1, 2, 3, 4]) == [1, 3, 4]


def test_priority_gives_up_what_matters_least() -> None:
    ledger = PageLedger(7, PAGE, eviction="priority")
    for number, priority in ((1, 5), (2, 1), (3, 5), (4, 5)):
        serve(ledger, number, priority)
    assert kept(ledger, [1, 2, 3, 4]) == [1, 3, 4]


@pytest.mark.parametrize("policy", ["lfu", "fifo", "priority"])
def test_pages_without_content_go_before_cached_ones(policy: str) -> None:
    ledger = PageLedger(4, PAGE, eviction=policy)
    serve(ledger, 1)
    ledger.claim("no ids")
    ledger.alloc("no ids", 2 * PAGE)
    assert ledger.metrics().evictions == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tail_of_a_prefix_goes_before_its_head(policy: str) -> None:
    ledger = PageLedger(3, PAGE, eviction=policy)
    serve(ledger, 1)
    ledger.claim("other")
    ledger.alloc("other", 2 * PAGE)
    ledger.claim("probe", prompt(1))
    assert ledger.forecast("probe", len(prompt(1))).cached_tokens == PAGE


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_pages_stay(policy: str) -> None:
    ledger = PageLedger(5, PAGE, eviction=policy)
    ledger.claim("system", prompt(0))
    ledger.alloc("system", 2 * PAGE)
    ledger.commit("system", 2 * PAGE)
    assert ledger.pin("system prompt", "system") == 2
    ledger.release("system")
    for number in range(1, 6):
        serve(ledger, number)
    assert kept(ledger, [0, 4, 5]) == [0, 5]
    ledger.unpin("system prompt")
    ledger.check_integrity()
    assert ledger.metrics().used_pages == 0


def test_an_unknown_policy_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"must be one of lru, lfu, fifo or priority\. Try: .*=lru"):
        PageLedger(4, PAGE, eviction="lry")
