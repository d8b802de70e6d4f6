"""What cannot be asked is refused before a model runs."""

from __future__ import annotations

from typing import Any

import pytest

from kvcfg.errors import ConfigError
from kvcfg.evaluation.retrieval.request import RetrievalRequest


def test_a_task_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"needel must be one of needle, multi_key, .*\. Try: tasks=\[needle\]"):
        RetrievalRequest(("needel",))


def test_prompts_longer_than_the_context_are_refused_with_a_length_that_fits(letters: Any) -> None:
    with pytest.raises(ConfigError, match=r"context of 500\. Try: task_tokens=492"):
        RetrievalRequest(("needle",), 500).prompts(letters, 500)
    assert list(RetrievalRequest(("needle",), 492).prompts(letters, 500)) == ["needle"]


def test_prompts_too_short_for_a_task_are_refused_with_a_length_that_suffices(letters: Any) -> None:
    with pytest.raises(ConfigError, match=r"task_tokens=100: needle needs at least 171 tokens"):
        RetrievalRequest(("needle",), 100).prompts(letters, 4096)


def test_there_are_so_many_prompts_of_each_task(letters: Any) -> None:
    prompts = RetrievalRequest(("needle", "variables"), 1024, 3).prompts(letters, 4096)
    assert {task: len(made) for task, made in prompts.items()} == {"needle": 3, "variables": 3}


def test_without_tasks_nothing_is_asked(letters: Any) -> None:
    request = RetrievalRequest(())
    assert (request.num_tokens, request.prompts(letters, 10)) == (0, {})
