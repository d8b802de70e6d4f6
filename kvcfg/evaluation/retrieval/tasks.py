"""The retrieval tasks by name: of RULER's kinds (Hsieh et al., 2024), in words of our own, and without any data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcfg.evaluation.retrieval.frequent_words import WORDS, frequent_words_prompt
from kvcfg.evaluation.retrieval.multi_key import multi_key_prompt
from kvcfg.evaluation.retrieval.multi_value import multi_value_prompt
from kvcfg.evaluation.retrieval.needle import needle_prompt
from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt
from kvcfg.evaluation.retrieval.variables import NAME, variables_prompt

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where what is asked for is hidden, one prompt after the other: 0 = at the beginning, 1 = before the question."""


@dataclass(frozen=True, slots=True)
class RetrievalTask:
    """A kind of prompt, and how its answers are read.

    Attributes:
        make: a prompt from a tokenizer, a length, a depth and what chooses at random.
        answer_tokens: tokens of an answer: what is asked for in any tokenizer, and what stands between.
        item: regular expression of one thing that an answer may name.
    """

    make: Callable[[Any, int, float, random.Random], RetrievalPrompt]
    answer_tokens: int
    item: str


TASKS = {
    "needle": RetrievalTask(needle_prompt, 8, r"\d+"),
    "multi_key": RetrievalTask(multi_key_prompt, 8, r"\d+"),
    "multi_value": RetrievalTask(multi_value_prompt, 40, r"\d+"),
    "variables": RetrievalTask(variables_prompt, 32, NAME),
    "frequent_words": RetrievalTask(frequent_words_prompt, 16, rf"\b(?:{'|'.join(WORDS)})\b"),
}


def retrieval_prompts(
    task: str, tokenizer: Any, length: int, count: int, *, depths: Sequence[float] = DEPTHS, seed: int = 0
) -> list[RetrievalPrompt]:
    """Prompts of one task and length, the same for the same arguments.

    Args:
        task: a name in `TASKS`.
        tokenizer: of the model; the text begins as it begins texts.
        length: tokens of every prompt.
        count: prompts.
        depths: where what is asked for is hidden, in turn.
        seed: of all that is chosen at random.

    Raises:
        NoRoomError: if the task does not fit in the length.
    """
    chooser = random.Random(seed)
    return [TASKS[task].make(tokenizer, length, depths[number % len(depths)], chooser) for number in range(count)]
