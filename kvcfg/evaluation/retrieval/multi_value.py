"""Multi-value needle: several numbers under one name, all of which are asked for.

What is found first draws attention away from the rest, so each number is worth its share of the answer.
"""

from __future__ import annotations

import random
from typing import Any

from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt, five_digits, hide, spread

NUM_VALUES = 4

_TASK = "The lock of the chest has four codes, and this text names them all. Keep the codes in mind."
_HIDDEN = " One code of the chest is {code}."
_QUESTION = " What are the four codes of the chest? The four codes of the chest are"


def multi_value_prompt(tokenizer: Any, length: int, depth: float, chooser: random.Random) -> RetrievalPrompt:
    """Hide one code in each quarter of the text; `depth` decides nothing, the codes are everywhere.

    Raises:
        NoRoomError: if task, codes and question leave no room for filler.
    """
    codes = five_digits(NUM_VALUES, chooser)
    sentences = [_HIDDEN.format(code=code) for code in codes]
    hidden = list(zip(spread(NUM_VALUES, chooser), sentences, strict=True))
    return RetrievalPrompt(hide(tokenizer, length, _TASK, hidden, _QUESTION, chooser), tuple(codes))
