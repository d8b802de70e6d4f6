"""How often a model finds in a long text what it is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One retrieval task with one cache.

    Attributes:
        right: share of what was asked for that was found with this cache, 0 to 1.
        right_reference: the same with the full-precision cache, in the same run.
        num_prompts: prompts.
        prompt_tokens: tokens of each.
    """

    right: float
    right_reference: float
    num_prompts: int
    prompt_tokens: int
