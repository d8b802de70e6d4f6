"""Reading traces: both forms, what is forgiven, and what is refused with its line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcfg.errors import ConfigError
from kvcfg.evaluation.traces import BlockPrompt, TokenPrompt, Trace

GOOD = {"input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}


def test_a_block_is_known_by_all_before_it(trace_of: Callable[..., Trace]) -> None:
    lines = [{"input_length": 1024, "hash_ids": ids} for ids in ([1, 2], [3, 2], [1, 2], [1, 1])]
    first, other, again, twice = (
        prompt.blocks for prompt in trace_of(lines).prompts if isinstance(prompt, BlockPrompt)
    )
    assert first == again
    assert first[1] != other[1]
    assert twice[0] == first[0] != twice[1]


def test_ids_may_be_texts(trace_of: Callable[..., Trace]) -> None:
    trace = trace_of([{"input_length": 600, "hash_ids": ["ab", "cd"]}, {"input_length": 512, "hash_ids": ["ab"]}])
    assert [prompt.blocks for prompt in trace.prompts if isinstance(prompt, BlockPrompt)] == [(0, 1), (0,)]


def test_text_counts_its_bytes(trace_of: Callable[..., Trace]) -> None:
    trace = trace_of([{"text": "grüße"}, {"text": "\ud800"}])
    assert [len(prompt.ids) for prompt in trace.prompts if isinstance(prompt, TokenPrompt)] == [7, 3]


@pytest.mark.parametrize("name", ["trace.jsonl.gz", "trace.jsonl"])
def test_gzip_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n".encode()))
    assert len(Trace.read(path).prompts) == 2


@pytest.mark.parametrize(("tokens", "ids"), [(0, []), (511, []), (512, [1]), (700, [1]), (700, [1, 2])])
def test_the_part_block_at_the_end_may_have_a_name_or_none(
    trace_of: Callable[..., Trace], tokens: int, ids: list[int]
) -> None:
    assert trace_of([{"input_length": tokens, "hash_ids": ids}]).unnamed_tokens == 0


def test_full_blocks_without_a_name_are_counted(trace_of: Callable[..., Trace]) -> None:
    assert trace_of([GOOD, {"input_length": 2000, "hash_ids": [7]}]).unnamed_tokens == 1024


@pytest.mark.parametrize(
    ("tokens", "count", "fits"), [(1000, 63, "=16"), (1000, 8, "=128"), (4096, 4, "=1024"), (10**6, 0, None)]
)
def test_another_block_size_is_noticed(
    trace_of: Callable[..., Trace], tokens: int, count: int, fits: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        trace_of([{"input_length": tokens, "hash_ids": list(range(count))}])
    assert caught.value.problems[0].fix == (None if fits is None else f"workload.trace_block_size{fits}")


def test_block_size_that_was_offered_is_accepted(trace_of: Callable[..., Trace]) -> None:
    assert trace_of([{"input_length": 1000, "hash_ids": list(range(63))}], 16).unnamed_tokens == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ('{"prompt": "x"}', "line 2 must be an object with hash_ids, tokens or text"),
        ('{"text": "x", "hash_ids": []}', "it has hash_ids and text"),
        ('{"hash_ids": [1]}', "line 2: input_length must be the prompt's length"),
        ('{"hash_ids": [1], "input_length": -5}', "line 2: input_length must be"),
        ('{"hash_ids": [1], "input_length": 5.5}', "line 2: input_length must be"),
        ('{"hash_ids": [1], "input_length": true}', "line 2: input_length must be"),
        ('{"hash_ids": 7, "input_length": 5}', "line 2: hash_ids must be a list of integers or texts"),
        ('{"hash_ids": [1.5], "input_length": 5}', "line 2: hash_ids must be a list of integers or texts"),
        ('{"hash_ids": [null], "input_length": 5}', "line 2: hash_ids must be a list of integers or texts"),
        ('{"hash_ids": [1, 2], "input_length": 512}', "line 2 names 2 blocks for 512 tokens"),
        ('{"tokens": "abc"}', "line 2: tokens must be a list"),
        ('{"tokens": [1, "two"]}', "line 2: token ids must be integers"),
        ('{"tokens": [1, 4294967296]}', "line 2: token ids must be integers"),
        ('{"tokens": [1, -100]}', "line 2: token ids must not be negative"),
        ('{"text": 5}', "line 2: text must be text"),
        ('{"text": "x", "salt": [1]}', "line 2: salt must be text or a number"),
        ('{"text": "x"}', "line 2 has tokens and the lines before have hash_ids"),
    ],
)
def test_a_bad_line_is_named(trace_of: Callable[..., Trace], line: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trace_of([GOOD, line])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe", b"\x1f\x8bbroken"])
def test_a_file_without_requests_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"workload\.trace=.*(holds no request|cannot be read)"):
        Trace.read(path)


@pytest.mark.parametrize("name", ["nothing.jsonl", "."])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"workload\.trace=.*cannot be read"):
        Trace.read(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    assert len(Trace.read(path).prompts) == 1


def test_separators_that_json_allows_in_texts_end_no_line(trace_of: Callable[..., Any]) -> None:
    assert len(trace_of(['{"text": "one\u2028line\x85 only"}']).prompts) == 1
