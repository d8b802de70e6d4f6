"""Traces through the ledger, and that it agrees with the capacity curve wherever that one applies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.cache.eviction import POLICIES
from kvcfg.errors import ConfigError
from kvcfg.evaluation.lru_curve import LruCurve
from kvcfg.evaluation.serving import Served, serve
from kvcfg.evaluation.trace_pages import PagedTrace
from kvcfg.evaluation.traces import BLOCK_TOKENS, BlockPrompt, Trace

CAPACITIES = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 1000)

Make = Callable[..., Trace]
Talks = Callable[..., list[dict[str, Any]]]


def assert_agree(served: Served, curve: LruCurve, pages: int) -> None:
    assert served.found == tuple(curve.found(index, pages) for index in range(len(served.found)))
    figures = (served.hit_pages, served.hit_tokens, served.saved_tokens, served.hit_rate)
    assert figures == (
        curve.hit_pages(pages),
        curve.hit_tokens(pages),
        curve.saved_tokens(pages),
        curve.hit_rate(pages),
    )
    assert (served.evictions, served.peak_pages) == (curve.evictions(pages), curve.peak_pages(pages))


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("page_size", [64, 512, 1024, 1536])
@pytest.mark.parametrize("seed", range(3))
def test_ledger_and_curve_agree_on_conversations(
    talks: Talks, trace_of: Make, page_size: int, seed: int, head_first: bool
) -> None:
    trace = PagedTrace.of(trace_of(talks(seed)), page_size)
    curve = LruCurve(trace, head_first=head_first)
    for tokens in CAPACITIES:
        pages = max(1, tokens * BLOCK_TOKENS // page_size)
        assert_agree(serve(trace, pages, head_first=head_first), curve, pages)
    assert serve(trace, head_first=head_first).hit_pages == curve.hit_pages(None)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 7)), min_size=1, max_size=25),
    st.sampled_from([1, 2, 8, 16]),
    st.integers(1, 60),
    st.booleans(),
)
def test_ledger_and_curve_agree_on_any_trace(
    prompts: list[tuple[list[int], int]], page_size: int, pages: int, head_first: bool
) -> None:
    numbers: dict[tuple[int, ...], int] = {}
    made = []
    for ids, short in prompts:
        chain = tuple(numbers.setdefault(tuple(ids[: end + 1]), len(numbers)) for end in range(len(ids)))
        made.append(BlockPrompt(max(8 * len(ids) - short, 0), chain))
    trace = PagedTrace.of(Trace("x", 8, tuple(made)), page_size)
    assert_agree(serve(trace, pages, head_first=head_first), LruCurve(trace, head_first=head_first), pages)


def test_ledger_and_curve_agree_on_plain_tokens(trace_of: Make) -> None:
    lines = [{"tokens": [*range(number % 50), *[number % 7] * 9]} for number in range(80)]
    trace = PagedTrace.of(trace_of(lines), 4)
    curve = LruCurve(trace)
    assert curve.hit_rate(None) > 0.4
    for pages in CAPACITIES:
        assert_agree(serve(trace, pages), curve, pages)


def test_a_first_use_is_never_found(trace_of: Make) -> None:
    line = {"input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}
    served = serve(PagedTrace.of(trace_of([line, line, line]), 512))
    assert (served.hit_pages, served.hit_rate) == (4, 4 * 512 / 3072)
    assert served.saved_tokens == 2 * 1023


@pytest.mark.parametrize(("head_first", "found"), [(True, 0), (False, 3)])
def test_of_a_prompt_longer_than_the_cache_the_end_or_the_beginning_stays(
    trace_of: Make, head_first: bool, found: int
) -> None:
    long = {"input_length": 5 * 512, "output_length": 1, "hash_ids": [1, 2, 3, 4, 5]}
    served = serve(PagedTrace.of(trace_of([long, long]), 512), 3, head_first=head_first)
    assert (served.hit_pages, served.evictions, served.peak_pages) == (found, 0 if found else 7, 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_policies_find_everything_when_there_is_room(talks: Talks, trace_of: Make, policy: str) -> None:
    trace = PagedTrace.of(trace_of(talks(1)), 512)
    served = serve(trace, eviction=policy)
    assert served.evictions == 0
    assert served.hit_pages == LruCurve(trace).hit_pages(None)


def test_policies_differ_when_there_is_none(talks: Talks, trace_of: Make) -> None:
    trace = PagedTrace.of(trace_of(talks(1)), 512)
    found = {policy: serve(trace, 21, eviction=policy).hit_pages for policy in POLICIES}
    assert found["lru"] == found["priority"]
    assert len({*found.values()}) == 3


def test_requests_that_run_together_hold_pages_together(talks: Talks, trace_of: Make) -> None:
    trace = PagedTrace.of(trace_of(talks(2)), 512)
    alone, together = (serve(trace, 200, running=running) for running in (1, 4))
    assert together.peak_pages > alone.peak_pages == max(request.num_pages for request in trace.requests)


def test_requests_wait_for_each_other_where_they_do_not_fit(talks: Talks, trace_of: Make) -> None:
    trace = PagedTrace.of(trace_of(talks(2)), 512)
    assert serve(trace, 5, running=50).peak_pages == 5


@pytest.mark.parametrize("setting", [{"num_pages": 0}, {"running": 0}])
def test_numbers_below_one_are_refused(talks: Talks, trace_of: Make, setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        serve(PagedTrace.of(trace_of(talks(0)), 512), **setting)  # type: ignore[arg-type]


def test_a_tier_behind_adds_what_only_it_has(talks: Talks, trace_of: Make) -> None:
    trace = PagedTrace.of(trace_of(talks(4)), 512)
    curve, device = LruCurve(trace), serve(trace, 21, eviction="lfu")
    assert device.behind(curve, 1).found == device.found
    both = device.behind(curve, 89).hit_pages
    assert max(device.hit_pages, curve.hit_pages(89)) <= both <= curve.hit_pages(None)
