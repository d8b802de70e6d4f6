"""What a model answers to retrieval prompts, and how much of it is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcfg.evaluation.free_running import continuation
from kvcfg.evaluation.quality import CacheMaker
from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt
from kvcfg.evaluation.retrieval.tasks import RetrievalTask


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Answers to the prompts of a task.

    Attributes:
        replies: what was generated, one a prompt.
        right: `[num_prompts]` float64, share of what was asked for that each reply names.
    """

    replies: tuple[str, ...]
    right: Tensor


def retrieve(
    model: Any,
    tokenizer: Any,
    task: RetrievalTask,
    prompts: Sequence[RetrievalPrompt],
    cache: CacheMaker,
    *,
    batch_size: int = 8,
) -> Retrieval:
    """Put prompts to a model; answers are greedy.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        task: what the prompts are of.
        prompts: of one length.
        cache: makes the cache of a batch, for `task.answer_tokens` more than a prompt has.
        batch_size: prompts at a time.
    """
    texts = torch.stack([prompt.tokens for prompt in prompts])
    generated = continuation(model, texts, cache, task.answer_tokens, batch_size=batch_size).tokens
    replies = tuple(tokenizer.decode(tokens) for tokens in generated.tolist())
    right = [share_right(reply, item.answers, task.item) for reply, item in zip(replies, prompts, strict=True)]
    return Retrieval(replies, torch.tensor(right, dtype=torch.float64))


def share_right(reply: str, answers: Sequence[str], item: str) -> float:
    """Share of the answers among as many things that a reply names first; one that names everything is not right.

    Args:
        reply: what was generated.
        answers: what was asked for, in any order.
        item: regular expression of one thing.
    """
    named = dict.fromkeys(re.findall(item, reply))
    return len({*answers} & {*list(named)[: len(answers)]}) / len(answers)
