"""Variable tracking: a number goes from variable to variable through the text, and another one through others.

To name all variables that hold a number, every assignment must be read in the light of the one before it.
"""

from __future__ import annotations

import random
from string import ascii_uppercase
from typing import Any

from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt, five_digits, hide, spread

CHAIN = 4
"""Variables that hold a number: the first is given it, each other one takes it from the one before."""

_NAME_LETTERS = 3
NAME = r"\b(?!ABC\b|DEF\b)[A-Z]{3}\b"
"""A variable in an answer; small models begin theirs with those of the example."""

_TASK = (
    "Keep track of the variables in this text. For example: let ABC = 11111. Let DEF = ABC. "
    "The 2 variables that hold 11111 are ABC, DEF."
)
_HIDDEN = " Let {name} = {source}."
_QUESTION = " Which variables hold {number}? The {count} variables that hold {number} are"


def variables_prompt(tokenizer: Any, length: int, depth: float, chooser: random.Random) -> RetrievalPrompt:
    """Hide two chains of assignments, one between the other, and ask for one; `depth` decides which.

    Raises:
        NoRoomError: if task, assignments and question leave no room for filler.
    """
    # No two names begin with one letter, and none with one of the example's.
    letters = chooser.sample(ascii_uppercase.replace("A", "").replace("D", ""), 2 * CHAIN)
    names = [letter + "".join(chooser.choices(ascii_uppercase, k=_NAME_LETTERS - 1)) for letter in letters]
    numbers = five_digits(2, chooser)
    chains = names[:CHAIN], names[CHAIN:]
    sentences = [
        _HIDDEN.format(name=chain[step], source=chain[step - 1] if step else number)
        for step in range(CHAIN)
        for chain, number in zip(chains, numbers, strict=True)
    ]
    asked = int(depth >= 0.5)
    hidden = list(zip(spread(len(sentences), chooser), sentences, strict=True))
    question = _QUESTION.format(number=numbers[asked], count=CHAIN)
    return RetrievalPrompt(hide(tokenizer, length, _TASK, hidden, question, chooser), tuple(chains[asked]))
