"""Names of the retrieval tasks that `kvcfg eval` can put to a cache; `kvcfg.evaluation.retrieval` asks them."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.errors import Problem, nearest, one_of

RETRIEVAL_TASKS = ("needle", "multi_key", "multi_value", "variables", "frequent_words")


def unknown_task(names: Sequence[str]) -> Problem | None:
    """What is wrong with a list of tasks: the first name that is none of theirs."""
    wrong = next((name for name in names if name not in RETRIEVAL_TASKS), None)
    if wrong is None:
        return None
    rule = f"{wrong} {one_of(RETRIEVAL_TASKS)}"
    return Problem("tasks", rule, list(names), f"tasks=[{nearest(wrong, RETRIEVAL_TASKS) or RETRIEVAL_TASKS[0]}]")
