"""A prompt that hides sentences in a long dull text and asks for them at its end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_FILLER = (
    " The river runs past the old mill.",
    " A grey cat sleeps on the wall.",
    " Bread is baked early in the morning.",
    " The road leads over the hill.",
    " Rain falls on the roof.",
    " The children walk home in the evening.",
)


@dataclass(frozen=True, slots=True)
class RetrievalPrompt:
    """A text with a question at its end.

    Attributes:
        tokens: `[length]` int64.
        answers: all that a right answer names, in any order.
    """

    tokens: Tensor
    answers: tuple[str, ...]


class NoRoomError(ValueError):
    """A prompt is too short for its task; `least` tokens have room for it."""

    def __init__(self, length: int, least: int) -> None:
        super().__init__(f"a prompt of {length} tokens has no room for its text; take {least} or more")
        self.least = least


def hide(
    tokenizer: Any, length: int, task: str, hidden: Sequence[tuple[float, str]], question: str, chooser: random.Random
) -> Tensor:
    """Tokens `[length]` of a task, sentences hidden among filler, and the question.

    Args:
        tokenizer: of the model; the text begins as it begins texts.
        length: tokens of all.
        task: what the text begins with.
        hidden: the share of the filler that stands before each sentence, to a sentence, and the sentence; in order.
        question: what the text ends with; the answer follows it.
        chooser: of the filler.

    Raises:
        NoRoomError: if the filler has no room.
    """
    begin, end = tokenizer(task)["input_ids"], plain_tokens(tokenizer, question)
    sentences = [(depth, plain_tokens(tokenizer, text)) for depth, text in hidden]
    room = length - len(begin) - len(end) - sum(len(tokens) for _, tokens in sentences)
    if room <= 0:
        raise NoRoomError(length, length - room + 1)
    filler = _filler(tokenizer, room, chooser)
    ends = list(accumulate(map(len, filler), initial=0))
    places = [min(range(len(ends)), key=lambda place: abs(ends[place] - depth * room)) for depth, _ in sentences]
    body: list[int] = []
    done = 0
    for place, (_, tokens) in zip(places, sentences, strict=True):
        body += [token for part in filler[done:place] for token in part] + tokens
        done = place
    return torch.tensor([*begin, *body, *(token for part in filler[done:] for token in part), *end])


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on from another one."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def spread(count: int, chooser: random.Random) -> list[float]:
    """So many depths from 0 to 1, ascending, one in each of as many equal parts of the text."""
    return [(part + chooser.random()) / count for part in range(count)]


def five_digits(count: int, chooser: random.Random) -> list[str]:
    """So many different numbers of five digits."""
    return [str(number) for number in chooser.sample(range(10_000, 100_000), count)]


def _filler(tokenizer: Any, room: int, chooser: random.Random) -> list[list[int]]:
    """Sentences of so many tokens in all; the first lacks its beginning, so that those around hidden ones are whole."""
    plain = [plain_tokens(tokenizer, sentence) for sentence in _FILLER]
    sentences: list[list[int]] = []
    while (surplus := sum(map(len, sentences)) - room) < 0:
        sentences.append(chooser.choice(plain))
    return [sentences[-1][surplus:], *sentences[:-1]]
