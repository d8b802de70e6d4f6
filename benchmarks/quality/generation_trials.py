"""What generation.py puts to every cache: a batch of prompts, and what becomes of them beside full precision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from candidates import Running
from torch import Tensor

from kvcfg.evaluation.free_running import Choices, continuation, first_divergence
from kvcfg.evaluation.quality import full_precision
from kvcfg.evaluation.retrieval.answers import Retrieval, retrieve
from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt
from kvcfg.evaluation.retrieval.tasks import DEPTHS, TASKS, retrieval_prompts

NEEDLE = TASKS["needle"]

Outcome = dict[str, float]
"""Figures of one prompt."""


class Trial(Protocol):
    """A batch of prompts and what is asked of it."""

    task: ClassVar[str]
    new_tokens: int

    @property
    def prompts(self) -> Tensor:
        """`[batch_size, prompt_tokens]` int64."""

    def reference(self, model: Any) -> Any:
        """What the model does in full precision."""

    def outcomes(self, running: Running, reference: Any) -> list[Outcome]:
        """What a candidate makes of each prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class FreeRun:
    """Go on from pieces of books: when does the answer first differ?"""

    task: ClassVar[str] = "divergence"
    prompts: Tensor
    new_tokens: int

    def reference(self, model: Any) -> Choices:
        """Greedy answers and their margins."""
        return continuation(model, self.prompts, full_precision, self.new_tokens, batch_size=len(self.prompts))

    def outcomes(self, running: Running, reference: Choices) -> list[Outcome]:
        """Tokens before the first difference, and whether it is a tie."""
        found = first_divergence(running.model, self.prompts, running, reference, batch_size=len(self.prompts))
        pairs = zip(found.tokens.tolist(), found.tied.tolist(), strict=True)
        return [{"tokens": tokens, "tied": tied} for tokens, tied in pairs]


@dataclass(frozen=True, slots=True, eq=False)
class Passkeys:
    """Find the keys in texts of one length."""

    task: ClassVar[str] = "passkey"
    asked: Sequence[RetrievalPrompt]
    tokenizer: Any
    new_tokens: int = NEEDLE.answer_tokens

    @property
    def prompts(self) -> Tensor:
        """`[batch_size, length]` int64."""
        return torch.stack([item.tokens for item in self.asked])

    def reference(self, model: Any) -> Retrieval:
        """Answers in full precision."""
        return self._answers(model, full_precision)

    def outcomes(self, running: Running, reference: Retrieval) -> list[Outcome]:
        """Whether each key was found and the share of its digits, beside those in full precision."""
        got = self._answers(running.model, running)
        columns = {
            "exact": (got.right == 1).tolist(),
            "digits": self._digits(got),
            "exact_reference": (reference.right == 1).tolist(),
            "digits_reference": self._digits(reference),
        }
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _answers(self, model: Any, cache: Any) -> Retrieval:
        return retrieve(model, self.tokenizer, NEEDLE, self.asked, cache, batch_size=len(self.asked))

    def _digits(self, got: Retrieval) -> list[float]:
        return [digits_right(reply, item.answers[0]) for reply, item in zip(got.replies, self.asked, strict=True)]


def digits_right(reply: str, key: str) -> float:
    """Share of a key's digits that stand in their place in the first number of a reply; a tenth by guessing."""
    found = re.search(NEEDLE.item, reply)
    return sum(a == b for a, b in zip(found.group() if found else "", key, strict=False)) / len(key)


def free_runs(prompts: Tensor, new_tokens: int, batch_size: int) -> list[Trial]:
    """Prompts `[num_prompts, prompt_tokens]` in batches."""
    return [FreeRun(batch, new_tokens) for batch in prompts.split(batch_size)]


def passkeys(tokenizer: Any, length: int, num_keys: int, batch_size: int) -> list[Trial]:
    """Prompts of one length in batches, so many of every depth."""
    asked = retrieval_prompts("needle", tokenizer, length, num_keys * len(DEPTHS))
    return [Passkeys(asked[first : first + batch_size], tokenizer) for first in range(0, len(asked), batch_size)]
