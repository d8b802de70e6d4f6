"""Plain text in aligned columns, no wider than a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100


def aligned(rows: Sequence[Sequence[str]], align: str, indent: int = 2, width: int = WIDTH) -> list[str]:
    """Rows as lines whose columns stand below each other; the last column wraps at `width`.

    Args:
        rows: cells, as many in each row as `align` has signs.
        align: `<` or `>` for each column.
        indent: blanks before every line.
        width: longest line; earlier columns are never cut for it.
    """
    widths = [max((len(row[index]) for row in rows), default=0) for index in range(len(align))]
    start = indent + sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines = []
    for row in rows:
        cells = [f"{cell:{sign}{size}}" for cell, sign, size in zip(row, align, widths, strict=True)]
        if align[-1] == "<":
            first, *more = textwrap.wrap(row[-1], max(20, width - start)) or [""]
            lines.append(" " * indent + "  ".join([*cells[:-1], first]))
            lines += [" " * start + rest for rest in more]
        else:
            lines.append(" " * indent + "  ".join(cells))
    return [line.rstrip() for line in lines]


def paragraph(text: str, indent: int = 0, width: int = WIDTH) -> list[str]:
    """A sentence or more, wrapped; an override is never broken in two."""
    blanks = " " * indent
    return textwrap.wrap(
        text, width, initial_indent=blanks, subsequent_indent=blanks, break_long_words=False, break_on_hyphens=False
    )


def command_words(words: Sequence[str], indent: int = 2, width: int = WIDTH) -> list[str]:
    """Overrides to paste: one line of a shell, continued where it gets too long."""
    lines = textwrap.wrap(" ".join(words), width - indent - 2, break_long_words=False, break_on_hyphens=False)
    return [" " * indent + line + " \\" * (line != lines[-1]) for line in lines]


def counted(number: int, noun: str) -> str:
    """A number and what it counts: 1 sequence, 9 sequences."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
