"""`kvcfg diff`: read both sides of every point, and print what differs."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.config.verbs import DiffOptions
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.comparison import Comparison, compare_sides
from kvcfg.evaluation.sides import Side, read_side
from kvcfg.results.store import ResultStore


def diff_sides(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """One comparison, or one for every point of a sweep."""
    made = [_compared(point.options) for point in points]
    if points[0].options.output == "json":
        rows = [item.to_dict() for item in made]
        print_json(arguments, rows)
    else:
        print("\n\n".join(item.table() for item in made))
    return 0


def _compared(options: DiffOptions) -> Comparison:
    store = ResultStore(options.results)
    return compare_sides(*(_side(options, key, store) for key in ("a", "b")))


def _side(options: DiffOptions, key: str, store: ResultStore) -> Side:
    text: str | None = getattr(options, key)
    if text is None:
        rule = "must be overrides, a file or the fingerprint of a row"
        raise ConfigError(Problem(key, rule, None, f"{key}=cache.kv_cache_format=int8"))
    return read_side(text, store, options.beside, key)
