"""Traces in pages: names shared by whom they should be, at pages smaller and larger than blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.errors import ConfigError
from kvcfg.evaluation.trace_pages import PagedTrace
from kvcfg.evaluation.traces import BlockPrompt, Trace

Make = Callable[..., Trace]


def blocks(*prompts: tuple[int, list[int]]) -> list[dict[str, Any]]:
    return [{"input_length": tokens, "hash_ids": ids} for tokens, ids in prompts]


def test_small_pages_of_a_block_follow_its_tokens(trace_of: Make) -> None:
    (request,) = PagedTrace.of(trace_of(blocks((512 + 100, [1, 2]))), 64).requests
    assert request.runs == (range(10),)
    assert len(set(request.pages())) == request.num_pages == 10


def test_a_block_that_is_also_an_end_shares_the_pages_of_its_beginning(trace_of: Make) -> None:
    paged = PagedTrace.of(trace_of(blocks((100, [1]), (1024, [1, 2]), (200, [1]))), 64)
    short, long, middle = (request.pages() for request in paged.requests)
    assert (len(short), len(middle)) == (2, 4)
    assert long[:2] == short
    assert long[:4] == middle
    assert paged.unique_pages == 16


def test_runs_are_cut_where_prompts_part(trace_of: Make) -> None:
    prompts = blocks((2048, [1, 2, 3, 4]), (1024, [1, 2]), (2048, [1, 2, 3, 5]))
    runs = [request.runs for request in PagedTrace.of(trace_of(prompts), 512).requests]
    assert runs == [
        (range(2), range(2, 3), range(3, 4)),
        (range(2),),
        (range(2), range(2, 3), range(4, 5)),
    ]


def test_large_pages_count_the_blocks_that_are_in_them(trace_of: Make) -> None:
    paged = PagedTrace.of(trace_of(blocks((1500, [1, 2, 3]), (2048, [1, 2, 3, 4]))), 1024)
    part, whole = paged.requests
    assert part.pages()[0] == whole.pages()[0] and part.pages()[1] != whole.pages()[1]
    assert [part.tokens_in(count, 1024) for count in (0, 1, 2)] == [0, 1024, 1536]
    assert whole.tokens_in(2, 1024) == 2048


def test_the_last_token_of_a_plain_prompt_is_computed(trace_of: Make) -> None:
    paged = PagedTrace.of(trace_of([{"tokens": list(range(8))}, {"tokens": []}]), 4)
    assert [request.num_pages for request in paged.requests] == [1, 0]


def test_salts_keep_apart(trace_of: Make) -> None:
    lines = [{"text": "a prompt"}, {"text": "a prompt", "salt": "b"}, {"text": "a prompt", "salt": "b"}]
    plain, salted, again = (request.pages() for request in PagedTrace.of(trace_of(lines), 4).requests)
    assert salted == again and not set(plain) & set(salted)


@pytest.mark.parametrize("page_size", [48, 768])
def test_pages_that_cut_blocks_are_refused(trace_of: Make, page_size: int) -> None:
    with pytest.raises(
        ConfigError, match=r"must divide 512 or be a multiple of it.*Try: cache\.kv_cache_page_size=512"
    ):
        PagedTrace.of(trace_of(blocks((512, [1]))), page_size)


def test_pages_of_plain_prompts_have_any_size(trace_of: Make) -> None:
    assert PagedTrace.of(trace_of([{"tokens": list(range(100))}]), 48).unique_pages == 2


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=5), st.integers(0, 7)), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4, 8, 16, 24]),
)
def test_two_prompts_share_the_pages_that_their_common_blocks_fill(
    prompts: list[tuple[list[int], int]], page_size: int
) -> None:
    """Blocks are tuples of ids here, so that what is shared can be said without numbering anything."""
    numbers: dict[tuple[int, ...], int] = {}
    made = []
    for ids, short in prompts:
        chain = tuple(numbers.setdefault(tuple(ids[: end + 1]), len(numbers)) for end in range(len(ids)))
        made.append(BlockPrompt(max(8 * len(ids) - short, 0), chain))
    paged = PagedTrace.of(Trace("x", 8, tuple(made)), page_size).requests
    for one, mine in zip(made, paged, strict=True):
        for two, other in zip(made, paged, strict=True):
            common = sum(a == b for a, b in zip(one.blocks, two.blocks, strict=False))
            if page_size <= 8:
                tokens = [min(8 * common, -(-p.input_tokens // page_size) * page_size) for p in (one, two)]
                expected = min(tokens) // page_size
            else:
                step = page_size // 8
                expected = -(-common // step) if one.blocks == two.blocks else common // step
            assert sum(a == b for a, b in zip(mine.pages(), other.pages(), strict=False)) == expected
