"""An export as text for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from textwrap import indent
from typing import TYPE_CHECKING

from kvcfg.planning.layout import paragraph

if TYPE_CHECKING:
    from kvcfg.exporters.exported import Export


def export_text(made: Export, path: str | None = None) -> str:
    """The whole export.

    Args:
        made: the export.
        path: where the file was written; None shows it instead.
    """
    where = [f"{path} is written."] if path else [f"{made.file_name}:", indent(made.text.rstrip(), "    ")]
    sections = [
        [f"{made.engine} {made.version}"],
        where,
        ["Start it with:", f"    {shlex.join(made.command(path))}"],
        _section("Not said, because the engine cannot be told:", map(str, made.losses)),
        _section("Replaced by the engine, without asking:", map(str, made.changes)),
        _section("Converted:", map(str, made.conversions)),
        _section("Needed besides:", made.needs),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _section(title: str, items: Iterable[str]) -> Sequence[str]:
    lines = [line for item in items for line in _item(item)]
    return [title, *lines] if lines else []


def _item(text: str) -> list[str]:
    first, *rest = paragraph(text)
    return [f"  - {first}", *(f"    {line}" for line in rest)]
