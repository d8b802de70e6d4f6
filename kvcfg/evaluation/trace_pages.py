"""A trace in pages: which prompts share which pages, at one page size.

Pages are numbers. A page smaller than a named block is a part of it; a larger one is made of whole blocks and known
by the last of them, as each block stands for all before it. A trace names the block at a prompt's end, so that is
cached like the others and counted whole. Of plain prompts the full pages are named, as the engine does it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kvcfg.cache.prefix import PageHasher
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.traces import BlockPrompt, TokenPrompt, Trace
from kvcfg.units import ceil_div

PAGE_KEY = "cache.kv_cache_page_size"


@dataclass(frozen=True, slots=True)
class PagedRequest:
    """One request: its prompt in tokens, and in pages.

    Attributes:
        input_tokens: the prompt's length.
        runs: its pages from first to last, in runs that every prompt has whole or not at all.
        num_pages: how many.
        last_tokens: tokens of the last page that are named.
    """

    input_tokens: int
    runs: tuple[range, ...]
    num_pages: int
    last_tokens: int

    def pages(self) -> list[int]:
        """Every single page."""
        return [page for run in self.runs for page in run]

    def tokens_in(self, num_pages: int, page_size: int) -> int:
        """Named tokens of the first pages."""
        missing = page_size - self.last_tokens if num_pages and num_pages == self.num_pages else 0
        return num_pages * page_size - missing


@dataclass(frozen=True, slots=True)
class PagedTrace:
    """All requests of a trace in pages of one size.

    Attributes:
        page_size: tokens in a page.
        requests: in the order in which they arrive.
        input_tokens: tokens of all prompts.
        unique_pages: different pages; a cache that large gives up nothing.
    """

    page_size: int
    requests: tuple[PagedRequest, ...]
    input_tokens: int
    unique_pages: int

    @classmethod
    def of(cls, trace: Trace, page_size: int) -> PagedTrace:
        """The trace in pages of that size.

        Raises:
            ConfigError: if pages would cut the trace's blocks.
        """
        check_page_size(trace, page_size)
        requests = _with_common_runs(list(_paged(trace, page_size)))
        runs = {run for request in requests for run in request.runs}
        input_tokens = sum([request.input_tokens for request in requests])
        return cls(page_size, tuple(requests), input_tokens, sum(map(len, runs)))


def check_page_size(trace: Trace, page_size: int) -> None:
    """Refuse a page size that would cut the blocks of a trace.

    Raises:
        ConfigError: if it neither divides the block size nor is a multiple of it.
    """
    size = trace.block_size
    if isinstance(trace.prompts[0], BlockPrompt) and size % page_size and page_size % size:
        rule = f"must divide {size} or be a multiple of it: the trace names blocks of {size} tokens"
        raise ConfigError(Problem(PAGE_KEY, rule, page_size, f"{PAGE_KEY}={size}"))


def _paged(trace: Trace, page_size: int) -> Iterator[PagedRequest]:
    """Each prompt in pages, in runs as long as it allows."""
    hasher, block_size = PageHasher(), trace.block_size
    numbers: dict[Hashable, int] = {}
    for prompt in trace.prompts:
        if isinstance(prompt, TokenPrompt):
            count = max(prompt.input_tokens - 1, 0) // page_size  # the last token is always computed
            names = hasher.chain(hasher.root(prompt.salt), prompt.ids, page_size, 0, count)
            yield _numbered(prompt.input_tokens, names, numbers, page_size)
        elif page_size <= block_size:
            yield _parts_of_blocks(prompt, block_size, page_size)
        else:
            step, blocks = page_size // block_size, prompt.blocks
            last_of_each = blocks[step - 1 :: step] + (blocks[-1:] if len(blocks) % step else ())
            last_tokens = (len(blocks) % step or step) * block_size
            yield _numbered(prompt.input_tokens, last_of_each, numbers, last_tokens)


def _numbered(
    input_tokens: int, names: Sequence[Hashable], numbers: dict[Hashable, int], last_tokens: int
) -> PagedRequest:
    pages = [numbers.setdefault(name, len(numbers)) for name in names]
    return PagedRequest(input_tokens, tuple(_stretches(pages)), len(pages), last_tokens)


def _parts_of_blocks(prompt: BlockPrompt, block_size: int, page_size: int) -> PagedRequest:
    """Each block is as many pages; the last block of a prompt may be fewer."""
    per_block, blocks = block_size // page_size, prompt.blocks
    rest = prompt.input_tokens - block_size * (len(blocks) - 1)
    lacking = per_block - min(ceil_div(rest, page_size), per_block) if blocks else 0
    runs = [range(run.start * per_block, run.stop * per_block) for run in _stretches(blocks)]
    if lacking:
        runs[-1] = range(runs[-1].start, runs[-1].stop - lacking)
    return PagedRequest(prompt.input_tokens, tuple(runs), len(blocks) * per_block - lacking, page_size)


def _stretches(numbers: Sequence[int]) -> list[range]:
    """Numbers as ranges of those that follow each other."""
    if not numbers:
        return []
    ends = [place for place, (one, two) in enumerate(pairwise(numbers), 1) if two != one + 1]
    return [range(numbers[start], numbers[stop - 1] + 1) for start, stop in pairwise([0, *ends, len(numbers)])]


def _with_common_runs(requests: Sequence[PagedRequest]) -> list[PagedRequest]:
    """The same with runs cut where another prompt ends or goes on differently.

    No prompt begins to share inside a run: a page stands for all before it, so it has one page before it.
    """
    stops = sorted({run.stop for request in requests for run in request.runs})
    return [
        replace(request, runs=tuple([part for run in request.runs for part in _cut(run, stops)]))
        for request in requests
    ]


def _cut(run: range, stops: Sequence[int]) -> Iterator[range]:
    inside = stops[bisect_right(stops, run.start) : bisect_left(stops, run.stop)]
    return (range(start, stop) for start, stop in pairwise([run.start, *inside, run.stop]))
