"""Result rows as one table that fits a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.results.row import ResultRow
from kvcfg.units import readable_count

_COLUMNS = (
    "model",
    "format",
    "page",
    "bytes/token",
    "bits",
    "perplexity",
    "KL (nats)",
    "95% interval",
    "top-1",
    "tok/s",
)


def render(rows: Sequence[ResultRow]) -> str:
    """Plain text, one line a row, columns aligned, with lines that say what to compare the figures with."""
    return "\n".join([*aligned([_COLUMNS, *map(_cells, rows)], num_left=2), *_footer(rows)])


def aligned(cells: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Lines of a table: the header, a rule, then the rows; the first `num_left` columns flush left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _cells(row: ResultRow) -> tuple[str, ...]:
    low, high = row.kl_ci
    same = row.bytes_per_token_planned == row.bytes_per_token_allocated
    bytes_per_token = readable_count(row.bytes_per_token_planned)
    return (
        row.model,
        f"{row.format}{' *' * row.experimental}",
        str(row.page_size),
        bytes_per_token if same else f"{bytes_per_token} (allocated {readable_count(row.bytes_per_token_allocated)})",
        f"{row.bits_per_element:.4g}",
        f"{row.ppl:.3f}",
        f"{row.kl:.2e}",
        f"{low:.1e}..{high:.1e}",
        f"{row.top1:.1%}",
        f"{row.decode_tokens_per_s:.1f}",
    )


def _footer(rows: Sequence[ResultRow]) -> list[str]:
    if not rows:
        return []
    floors = sorted({f"{row.noise_floor:.1e}" for row in rows}, key=float)
    predictions = sorted({row.num_predictions for row in rows})
    counts = " to ".join(readable_count(count) for count in dict.fromkeys((predictions[0], predictions[-1])))
    references = dict.fromkeys(f"{row.ppl_reference:.3f} ({row.model})" for row in rows)
    planned_is_allocated = all(row.bytes_per_token_planned == row.bytes_per_token_allocated for row in rows)
    return [
        "",
        *(["*: experimental, no recipe that kvcfg has measured."] if any(row.experimental for row in rows) else []),
        *(["bytes/token: as planned, and as allocated."] if planned_is_allocated else []),
        f"KL: full-precision cache to this one, over {counts} predictions; the run's noise floor is "
        f"{' to '.join(dict.fromkeys((floors[0], floors[-1])))}.",
        f"Perplexity at full precision: {', '.join(references)}.",
    ]
