"""A comparison as text for people: only what differs, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from kvcfg.errors import show
from kvcfg.evaluation.comparison import REFUSED, Comparison, Difference
from kvcfg.planning.layout import aligned, paragraph
from kvcfg.units import readable_bytes, readable_count

_LONGEST = 60


def comparison_text(made: Comparison) -> str:
    """The whole comparison."""
    sections = [
        [*paragraph(f"a: {made.a.label}"), *paragraph(f"b: {made.b.label}")],
        _section("config", made.config),
        _section("planned, for one replica", made.planned),
        *(_section(f"kvcfg export engine={engine}", items) for engine, items in made.engines.items()),
        _section("measured", made.measured),
        [line for note in made.notes for line in paragraph(note)],
    ]
    if not (made.config or made.planned or made.engines or made.measured):
        sections.insert(1, ["Nothing differs."])
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _section(title: str, items: Sequence[Difference]) -> list[str]:
    if not items:
        return []
    rows = [[item.name, _value(item.name, item.a), _value(item.name, item.b), _ratio(item)] for item in items]
    return [title, *aligned(rows, "<<<<")]


def _value(name: str, value: object) -> str:
    if isinstance(value, Real) and not isinstance(value, bool):
        if "bytes" in name:
            return readable_bytes(float(value))
        return readable_count(float(value)) if isinstance(value, int) else f"{float(value):.4g}"
    text = "can be told" if value is None and name == REFUSED else show(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _ratio(item: Difference) -> str:
    """How many times as much b is as a."""
    numbers = [value for value in (item.a, item.b) if isinstance(value, Real) and not isinstance(value, bool)]
    if len(numbers) < 2 or not numbers[0]:
        return ""
    return f"× {float(numbers[1]) / float(numbers[0]):.3g}"
