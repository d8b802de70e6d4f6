"""Single needle: one number hidden in the text, as in the passkey task of Mohtashami and Jaggi (2023).

It shows whether a single token far back can still be read, which a mean over predictions hardly tells.
"""

from __future__ import annotations

import random
from typing import Any

from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt, hide

_TASK = "There is a pass key somewhere in this text. Find it and keep it in mind."
_HIDDEN = " The pass key is {key}. Remember it: {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"


def needle_prompt(tokenizer: Any, length: int, depth: float, chooser: random.Random) -> RetrievalPrompt:
    """Hide one key at a depth, 0 = at the beginning, 1 = right before the question.

    Raises:
        NoRoomError: if task, key and question leave no room for filler.
    """
    key = str(chooser.randrange(10_000, 100_000))
    tokens = hide(tokenizer, length, _TASK, [(depth, _HIDDEN.format(key=key))], _QUESTION, chooser)
    return RetrievalPrompt(tokens, (key,))
