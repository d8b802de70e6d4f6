"""Multi-key needle: several numbers that look alike, each with a name of its own, and one name that is asked for.

A cache that blurs keys into each other finds a number here, but not the right one.
"""

from __future__ import annotations

import random
from typing import Any

from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt, five_digits, hide, spread

NUM_KEYS = 4

_PLACES = ("barn", "cellar", "chapel", "garage", "harbour", "kitchen", "library", "stable", "tower", "workshop")
_TASK = "Every door in this text has a code of its own. Keep the codes in mind."
_HIDDEN = " The code of the {place} is {code}."
_QUESTION = " What is the code of the {place}? The code of the {place} is"


def multi_key_prompt(tokenizer: Any, length: int, depth: float, chooser: random.Random) -> RetrievalPrompt:
    """Hide one code in each quarter of the text, and ask for the one whose quarter holds the depth.

    Raises:
        NoRoomError: if task, codes and question leave no room for filler.
    """
    places, codes = chooser.sample(_PLACES, NUM_KEYS), five_digits(NUM_KEYS, chooser)
    sentences = [_HIDDEN.format(place=place, code=code) for place, code in zip(places, codes, strict=True)]
    asked = min(int(depth * NUM_KEYS), NUM_KEYS - 1)
    hidden = list(zip(spread(NUM_KEYS, chooser), sentences, strict=True))
    tokens = hide(tokenizer, length, _TASK, hidden, _QUESTION.format(place=places[asked]), chooser)
    return RetrievalPrompt(tokens, (codes[asked],))
