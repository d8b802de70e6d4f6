"""The capacity curve that one pass gives, against textbook caches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from kvcfg.evaluation.lru_curve import LruCurve
from kvcfg.evaluation.trace_pages import PagedTrace
from kvcfg.evaluation.traces import BLOCK_TOKENS, Trace

CAPACITIES = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 1000)

Make = Callable[..., Trace]
Talks = Callable[..., list[dict[str, Any]]]


def plain_lru(lines: list[dict[str, Any]], blocks: int) -> float:
    """The textbook: an ordered dict of blocks."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for line in lines:
        for block in line["hash_ids"]:
            hits += block in cache
            cache[block] = None
            cache.move_to_end(block)
            if len(cache) > blocks:
                cache.popitem(last=False)
    return hits * BLOCK_TOKENS / sum(line["input_length"] for line in lines)


def prefix_keeping_lru(lines: list[dict[str, Any]], blocks: int) -> float:
    """An ordered dict too, which looks a prompt up as a whole and counts its first block as used last."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for line in lines:
        ids = line["hash_ids"]
        hits += next((place for place, block in enumerate(ids) if block not in cache), len(ids))
        for block in reversed(ids):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > blocks:
            cache.popitem(last=False)
    return hits * BLOCK_TOKENS / sum(line["input_length"] for line in lines)


@pytest.mark.parametrize(("head_first", "textbook"), [(True, plain_lru), (False, prefix_keeping_lru)])
@pytest.mark.parametrize("seed", range(4))
def test_curve_is_what_an_ordered_dict_finds(
    talks: Talks, trace_of: Make, seed: int, head_first: bool, textbook: Callable[..., float]
) -> None:
    lines = talks(seed)
    curve = LruCurve(PagedTrace.of(trace_of(lines), BLOCK_TOKENS), head_first=head_first)
    assert [curve.hit_rate(blocks) for blocks in CAPACITIES] == [textbook(lines, blocks) for blocks in CAPACITIES]


@pytest.mark.parametrize("head_first", [True, False])
def test_more_room_never_finds_less(talks: Talks, trace_of: Make, head_first: bool) -> None:
    curve = LruCurve(PagedTrace.of(trace_of(talks(7)), 64), head_first=head_first)
    rates = [rate for _, rate in curve.corners()]
    assert rates == sorted(rates)
    assert rates[-1] == curve.hit_rate(None) == curve.hit_rate(curve.trace.unique_pages)


@pytest.mark.parametrize("page_size", [64, 512, 1536])
def test_a_prefix_that_outlives_its_end_is_found_at_least_as_often(
    talks: Talks, trace_of: Make, page_size: int
) -> None:
    trace = PagedTrace.of(trace_of(talks(3)), page_size)
    head, tail = LruCurve(trace), LruCurve(trace, head_first=False)
    assert all(head.hit_pages(pages) <= tail.hit_pages(pages) for pages in CAPACITIES)
    assert head.hit_pages(None) == tail.hit_pages(None)


@pytest.mark.parametrize("head_first", [True, False])
def test_no_cache_finds_and_gives_up_nothing(talks: Talks, trace_of: Make, head_first: bool) -> None:
    curve = LruCurve(PagedTrace.of(trace_of(talks(1)), 512), head_first=head_first)
    assert (curve.hit_tokens(0), curve.saved_tokens(0), curve.evictions(0), curve.peak_pages(0)) == (0, 0, 0, 0)


def test_short_prompts_are_found_at_most_whole(trace_of: Make) -> None:
    """Eight tokens of a page of 512: the page is found, and no more than the prompt is."""
    curve = LruCurve(PagedTrace.of(trace_of([{"input_length": 8, "hash_ids": [1]}] * 3), 512))
    assert (curve.hit_pages(None), curve.hit_rate(None), curve.saved_tokens(None)) == (2, 1.0, 14)


def test_a_trace_of_empty_prompts_finds_nothing(trace_of: Make) -> None:
    curve = LruCurve(PagedTrace.of(trace_of([{"input_length": 0, "hash_ids": []}] * 2), 16))
    assert (curve.hit_rate(None), curve.saved_tokens(None), curve.peak_pages(None)) == (0.0, 0, 0)
