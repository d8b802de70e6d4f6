"""Retrieval tasks of several rows as one table that fits a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.results.row import ResultRow
from kvcfg.results.table import aligned


def render_tasks(rows: Sequence[ResultRow], names: Sequence[str]) -> str:
    """Plain text, one line a row, a column a task, and a line that says what the figures are.

    Args:
        rows: rows that have a score of each task.
        names: the tasks.
    """
    scores = [[(row.tasks or {})[name] for name in names] for row in rows]
    cells = [
        (row.model, row.format, *(f"{score.right:.0%} / {score.right_reference:.0%}" for score in of_row))
        for row, of_row in zip(rows, scores, strict=True)
    ]
    any_score = scores[0][0]
    footer = (
        f"Tasks: share of right answers with this cache / at full precision, to prompts of {any_score.prompt_tokens:,} "
        f"tokens, {any_score.num_prompts} a task."
    )
    return "\n".join([*aligned([("model", "format", *names), *cells], num_left=2), "", footer])
