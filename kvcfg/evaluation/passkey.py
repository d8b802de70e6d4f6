"""Passkey retrieval: a number hidden in a long dull text, asked for at its end.

The task is that of Mohtashami and Jaggi (2023), in words of our own. It needs no data, and shows whether a single
token far back can still be read, which a mean over predictions hardly tells.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kvcfg.evaluation.free_running import continuation
from kvcfg.evaluation.quality import CacheMaker

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where keys are hidden unless told otherwise: 0 = at the beginning, 1 = right before the question."""

ANSWER_TOKENS = 8
"""Tokens of an answer: five digits in any tokenizer, and what follows them."""

_TASK = "There is a pass key somewhere in this text. Find it and keep it in mind."
_FILLER = (
    " The river runs past the old mill.",
    " A grey cat sleeps on the wall.",
    " Bread is baked early in the morning.",
    " The road leads over the hill.",
    " Rain falls on the roof.",
    " The children walk home in the evening.",
)
_HIDDEN = " The pass key is {key}. Remember it: {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"


@dataclass(frozen=True, slots=True)
class PasskeyPrompt:
    """A text with a key in it, and the question.

    Attributes:
        tokens: `[length]` int64.
        key: five digits.
        depth: share of the filler that stands before the key, to a sentence.
    """

    tokens: Tensor
    key: str
    depth: float


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Answers to passkey prompts.

    Attributes:
        answers: what was generated, one a prompt.
        exact: `[num_prompts]` whether the first number of the answer is the key.
        digits: `[num_prompts]` float64, share of the key's digits that stand in their place in that number.
    """

    answers: tuple[str, ...]
    exact: Tensor
    digits: Tensor

    @property
    def found(self) -> float:
        """Share of the keys that were found."""
        return self.exact.double().mean().item()

    @property
    def right_digits(self) -> float:
        """Share of all keys' digits that are right; a tenth by guessing."""
        return self.digits.mean().item()


def passkey_prompts(
    tokenizer: Any, length: int, *, num_keys: int, depths: Sequence[float] = DEPTHS, seed: int = 0
) -> list[PasskeyPrompt]:
    """Prompts of one length, the same for the same arguments: one a key and depth, all depths of a key in turn.

    Args:
        tokenizer: of the model; the text begins as it begins texts.
        length: tokens of every prompt.
        num_keys: keys of each depth; every prompt has one of its own.
        depths: where keys are hidden.
        seed: of keys and filler.

    Raises:
        ValueError: if task, key and question leave no room for filler.
    """
    chooser = random.Random(seed)
    places = [depth for _ in range(num_keys) for depth in depths]
    return [_prompt(tokenizer, length, depth, chooser) for depth in places]


def retrieve(
    model: Any, tokenizer: Any, prompts: Sequence[PasskeyPrompt], cache: CacheMaker, *, batch_size: int = 8
) -> Retrieval:
    """Ask a model for the keys; answers are greedy.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        prompts: of one length.
        cache: makes the cache of a batch, for `ANSWER_TOKENS` more than a prompt has.
        batch_size: prompts at a time.
    """
    texts = torch.stack([prompt.tokens for prompt in prompts])
    generated = continuation(model, texts, cache, ANSWER_TOKENS, batch_size=batch_size).tokens
    answers = tuple(tokenizer.decode(tokens) for tokens in generated.tolist())
    exact, digits = zip(*(score(answer, item.key) for answer, item in zip(answers, prompts, strict=True)), strict=True)
    return Retrieval(answers, torch.tensor(exact), torch.tensor(digits, dtype=torch.float64))


def score(answer: str, key: str) -> tuple[bool, float]:
    """Whether the first number of an answer is the key, and the share of the key's digits in their place in it."""
    found = re.search(r"\d+", answer)
    number = found.group() if found else ""
    return number == key, sum(a == b for a, b in zip(number, key, strict=False)) / len(key)


def _prompt(tokenizer: Any, length: int, depth: float, chooser: random.Random) -> PasskeyPrompt:
    key = str(chooser.randrange(10_000, 100_000))
    task = tokenizer(_TASK)["input_ids"]
    hidden, question = _plain(tokenizer, _HIDDEN.format(key=key)), _plain(tokenizer, _QUESTION)
    room = length - len(task) - len(hidden) - len(question)
    if room <= 0:
        raise ValueError(
            f"a passkey prompt of {length} tokens has no room for filler; take {length - room + 1} or more"
        )
    sentences = _filler(tokenizer, room, chooser)
    ends = list(accumulate(map(len, sentences), initial=0))
    before = min(range(len(ends)), key=lambda place: abs(ends[place] - depth * room))
    parts = [task, *sentences[:before], hidden, *sentences[before:], question]
    return PasskeyPrompt(torch.tensor([token for part in parts for token in part]), key, depth)


def _filler(tokenizer: Any, room: int, chooser: random.Random) -> list[list[int]]:
    """Sentences of so many tokens in all; the first lacks its beginning, so that those around the key are whole."""
    plain = [_plain(tokenizer, sentence) for sentence in _FILLER]
    sentences: list[list[int]] = []
    while (surplus := sum(map(len, sentences)) - room) < 0:
        sentences.append(chooser.choice(plain))
    return [sentences[-1][surplus:], *sentences[:-1]]


def _plain(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
