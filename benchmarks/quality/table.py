"""Rows as one table in Markdown, with what must be known to read it beneath."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rows import YARDSTICK, Failure, Row

from kvcfg.units import readable_count

_COLUMNS = (
    "model",
    "page",
    "cache",
    "bits",
    "bits effective",
    "KL (nats)",
    "95 % interval",
    "KL p99",
    f"× {YARDSTICK}",
    "× plain model",
    "perplexity",
    "top-1",
    "cut off",
)
_NUM_NAMES = 3


def markdown(rows: Sequence[Row], failures: Sequence[Failure]) -> str:
    """The table, the notes of its rows, and what could not be measured."""
    rules = ["---"] * _NUM_NAMES + ["---:"] * (len(_COLUMNS) - _NUM_NAMES)
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    lines = [_line(cells) for cells in (_COLUMNS, rules, *(_cells(row, notes) for row in rows))]
    return "\n".join([*lines, "", *_remarks(rows, notes), *_failed(failures)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, notes: Sequence[str]) -> tuple[str, ...]:
    name = {"experimental": f"{row.candidate} *", "peer": f"**{row.candidate}**"}.get(row.kind, row.candidate)
    mark = f" [{notes.index(row.note) + 1}]" if row.note else ""
    low, high = row.kl_ci
    return (
        row.model,
        str(row.page_size),
        f"{name}{mark}",
        f"{row.bits:.2f}",
        f"{row.bits_effective:.2f}",
        f"{row.kl:.2e}",
        f"{low:.1e} to {high:.1e}",
        f"{row.kl_p99:.1e}",
        _multiple(row.ratio),
        _multiple(row.twin_ratio),
        f"{row.ppl:.3f}",
        f"{row.top1:.2%}",
        f"{row.clip_rate:.1%}" if row.clip_rate else "",
    )


def _multiple(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.3g}"


def _remarks(rows: Sequence[Row], notes: Sequence[str]) -> list[str]:
    remarks = [f"[{number}] {note}." for number, note in enumerate(notes, 1)]
    if any(row.kind == "peer" for row in rows):
        remarks.append("Bold: caches that transformers ships; page = tokens given at a time.")
    if any(row.kind == "experimental" for row in rows):
        remarks.append("*: published methods as near as kvcfg's settings come to them.")
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        counts = sorted({row.num_predictions for row in own})
        predictions = " to ".join(readable_count(count) for count in dict.fromkeys((counts[0], counts[-1])))
        floors = [row.noise_floor for row in own if not math.isnan(row.noise_floor)]
        floor = f"noise floor {max(floors):.1e}" if floors else "noise floor not measured"
        remarks.append(
            f"{model}: {predictions} predictions a row in windows of {own[0].window_tokens:,} tokens, "
            f"{floor}, perplexity {own[0].ppl_reference:.3f} in full precision."
        )
    return [f"{remark}  " for remark in remarks]


def _failed(failures: Sequence[Failure]) -> list[str]:
    if not failures:
        return []
    lines = [f"- {item.model}, page {item.page_size}, {item.candidate}: {item.reason}" for item in failures]
    return ["", "Without figures, on some windows or on all:", "", *lines]
