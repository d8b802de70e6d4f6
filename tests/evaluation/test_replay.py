"""Traces through the ledger, and the capacity curve that one pass gives."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from kvcfg.cache.eviction import POLICIES
from kvcfg.errors import ConfigError
from kvcfg.evaluation.replay import LruCurve, replay_trace
from kvcfg.evaluation.traces import BLOCK_TOKENS, Trace

CAPACITIES = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 1000)


def conversations(seed: int, requests: int = 150) -> list[dict[str, Any]]:
    """Users that come back with all that was said before, and some that share a system prompt."""
    rng = random.Random(seed)
    fresh = iter(range(10**6))
    system = [next(fresh) for _ in range(3)]
    talks: list[list[int]] = []
    lines = []
    for number in range(requests):
        if not talks or rng.random() < 0.3:
            talks.append([*system[: rng.randrange(4)], next(fresh)])
        talk = rng.choice(talks[-8:])
        talk += [next(fresh) for _ in range(rng.randrange(1, 4))]
        tail = rng.randrange(1, BLOCK_TOKENS + 1)
        blocks = [*talk, next(fresh)]
        tokens = BLOCK_TOKENS * len(talk) + tail
        lines.append({"timestamp": number, "input_length": tokens, "output_length": 9, "hash_ids": blocks})
    return lines


def trace_of(folder: Path, lines: list[Any]) -> Trace:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return Trace.read(path)


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


@pytest.mark.parametrize("seed", range(4))
def test_curve_is_what_an_ordered_dict_finds(tmp_path: Path, seed: int) -> None:
    lines = conversations(seed)
    curve = LruCurve(trace_of(tmp_path, lines).paged(BLOCK_TOKENS), BLOCK_TOKENS)
    assert [curve.hit_rate(blocks) for blocks in CAPACITIES] == [plain_lru(lines, blocks) for blocks in CAPACITIES]


@pytest.mark.parametrize("page_size", [64, 512, 1024, 1536])
@pytest.mark.parametrize("seed", range(3))
def test_ledger_and_curve_find_the_same_pages(tmp_path: Path, page_size: int, seed: int) -> None:
    requests = trace_of(tmp_path, conversations(seed)).paged(page_size)
    curve = LruCurve(requests, page_size)
    for tokens in CAPACITIES:
        pages = max(1, tokens * BLOCK_TOKENS // page_size)
        assert replay_trace(requests, page_size, pages).hit_pages == curve.hit_pages(pages), pages
    assert replay_trace(requests, page_size).hit_pages == curve.hit_pages(None)


def test_ledger_and_curve_agree_on_plain_tokens(tmp_path: Path) -> None:
    rng = random.Random(5)
    trunk = [rng.randrange(1000) for _ in range(60)]
    lines = [{"tokens": trunk[: rng.randrange(60)] + [rng.randrange(9) for _ in range(9)]} for _ in range(80)]
    requests = trace_of(tmp_path, lines).paged(4)
    curve = LruCurve(requests, 4)
    assert curve.hit_rate(None) > 0.4
    for pages in CAPACITIES:
        assert replay_trace(requests, 4, pages).hit_pages == curve.hit_pages(pages)


def test_more_room_never_finds_less(tmp_path: Path) -> None:
    curve = LruCurve(trace_of(tmp_path, conversations(7)).paged(BLOCK_TOKENS), BLOCK_TOKENS)
    rates = [rate for _, rate in curve.corners()]
    assert rates == sorted(rates)
    assert rates[-1] == curve.hit_rate(None) == curve.hit_rate(curve.unique_pages)


def test_a_first_use_is_never_found(tmp_path: Path) -> None:
    line = {"input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}
    requests = trace_of(tmp_path, [line, line, line]).paged(BLOCK_TOKENS)
    result = replay_trace(requests, BLOCK_TOKENS)
    assert (result.hit_pages, result.hit_rate) == (4, 4 * 512 / 3072)
    assert result.saved_tokens == 2 * 1023


def test_a_prompt_longer_than_the_cache_leaves_its_end(tmp_path: Path) -> None:
    long = {"input_length": 5 * 512, "output_length": 1, "hash_ids": [1, 2, 3, 4, 5]}
    requests = trace_of(tmp_path, [long, long]).paged(BLOCK_TOKENS)
    result = replay_trace(requests, BLOCK_TOKENS, 3)
    assert (result.hit_pages, result.evictions, result.peak_pages) == (0, 7, 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_policies_find_everything_when_there_is_room(tmp_path: Path, policy: str) -> None:
    requests = trace_of(tmp_path, conversations(1)).paged(BLOCK_TOKENS)
    result = replay_trace(requests, BLOCK_TOKENS, eviction=policy)
    assert result.evictions == 0
    assert result.hit_pages == LruCurve(requests, BLOCK_TOKENS).hit_pages(None)


def test_policies_differ_when_there_is_none(tmp_path: Path) -> None:
    requests = trace_of(tmp_path, conversations(1)).paged(BLOCK_TOKENS)
    found = {policy: replay_trace(requests, BLOCK_TOKENS, 21, eviction=policy).hit_pages for policy in POLICIES}
    assert found["lru"] == found["priority"]
    assert len({*found.values()}) == 3


def test_requests_that_run_together_hold_pages_together(tmp_path: Path) -> None:
    requests = trace_of(tmp_path, conversations(2)).paged(BLOCK_TOKENS)
    alone, together = (replay_trace(requests, BLOCK_TOKENS, 200, running=running) for running in (1, 4))
    assert together.peak_pages > alone.peak_pages == max(request.num_pages for request in requests)


def test_the_last_token_of_a_plain_prompt_is_computed(tmp_path: Path) -> None:
    line = {"tokens": list(range(8))}
    result = replay_trace(trace_of(tmp_path, [line, line]).paged(4), 4)
    assert result.saved_tokens == 4


def test_text_counts_bytes_and_salts_keep_apart(tmp_path: Path) -> None:
    lines = [{"text": "grüße, cache"}, {"text": "grüße, cache", "salt": "b"}, {"text": "grüße, cache", "salt": "b"}]
    requests = trace_of(tmp_path, lines).paged(4)
    result = replay_trace(requests, 4)
    assert (result.input_tokens, result.hit_pages) == (3 * 14, 3)


def test_small_pages_of_a_block_follow_its_tokens(tmp_path: Path) -> None:
    line = {"input_length": 512 + 100, "output_length": 1, "hash_ids": [1, 2]}
    (request,) = trace_of(tmp_path, [line]).paged(64)
    assert [item.num_pages for item in request.pages] == [8, 2]
    assert len(set(request.page_names())) == request.num_pages == 10


@pytest.mark.parametrize("page_size", [48, 768])
def test_pages_that_cut_blocks_are_refused(tmp_path: Path, page_size: int) -> None:
    with pytest.raises(
        ConfigError, match=r"must divide 512 or be a multiple of it.*Try: cache\.kv_cache_page_size=512"
    ):
        trace_of(tmp_path, conversations(0)).paged(page_size)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ('{"prompt": "x"}', "line 2 must have hash_ids, tokens or text"),
        ('{"hash_ids": [1], "input_length": 513}', "line 2: input_length must need as many blocks"),
        ('{"hash_ids": [], "input_length": 0}', "line 2: input_length must need as many blocks"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trace_of(tmp_path, [{"tokens": [1]}, line])


def test_tokens_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token ids must be integers"):
        trace_of(tmp_path, [{"tokens": [1, "two"]}]).paged(4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"workload\.trace=.*cannot be read"):
        Trace.read(tmp_path / "nothing.jsonl")


def test_an_unbounded_cache_is_not_one_of_no_pages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        replay_trace(trace_of(tmp_path, conversations(0)).paged(512), 512, 0)


def test_replay_needs_neither_torch_nor_numpy() -> None:
    code = "import kvcfg.evaluation.replay, sys; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
