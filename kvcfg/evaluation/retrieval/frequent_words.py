"""Frequent words: a list of words, three of which come back far more often than the others.

Nothing in it stands out by its place: what is asked for is spread over the whole text, and so over the whole cache.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from kvcfg.evaluation.retrieval.prompts import NoRoomError, RetrievalPrompt, plain_tokens

NUM_FREQUENT = 3

WORDS = (
    "apple",
    "bell",
    "boat",
    "bridge",
    "candle",
    "chair",
    "cloud",
    "coat",
    "dog",
    "door",
    "field",
    "fire",
    "flower",
    "garden",
    "gold",
    "horse",
    "island",
    "lamp",
    "leaf",
    "letter",
    "milk",
    "moon",
    "paper",
    "ring",
    "salt",
    "snow",
    "stone",
    "table",
    "tree",
    "window",
)

_OFTEN, _OTHERS = 2, 6
_BLOCKS = 3
_TASK = "Read this list of words and count how often each of them comes."
_QUESTION = " Which three words come most often? The three words that come most often are"


def frequent_words_prompt(tokenizer: Any, length: int, depth: float, chooser: random.Random) -> RetrievalPrompt:
    """List words; `depth` decides nothing, the words are everywhere.

    The list is made of blocks, in which each frequent word comes twice and six others once. Only the first is cut.

    Raises:
        NoRoomError: if task and question leave no room for three blocks.
    """
    frequent = chooser.sample(WORDS, NUM_FREQUENT)
    others = [word for word in WORDS if word not in frequent]
    tokens = {word: plain_tokens(tokenizer, f" {word}") for word in WORDS}
    begin, end = tokenizer(_TASK)["input_ids"], plain_tokens(tokenizer, _QUESTION)
    room = length - len(begin) - len(end)
    needed = _BLOCKS * (NUM_FREQUENT * _OFTEN + _OTHERS) * max(map(len, tokens.values()))
    if room < needed:
        raise NoRoomError(length, length - room + needed)
    listed: list[int] = []
    while len(listed) < room:
        block = frequent * _OFTEN + chooser.sample(others, _OTHERS)
        chooser.shuffle(block)
        listed += [token for word in block for token in tokens[word]]
    return RetrievalPrompt(torch.tensor([*begin, *listed[len(listed) - room :], *end]), tuple(frequent))
