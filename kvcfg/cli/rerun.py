"""`kvcfg rerun`: measure a row of the results again; exit code 1 if its figures do not repeat."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.sides import find_row
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore


def rerun_row(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """Every row is found before the first is run."""
    rows = [_found(point) for point in points]
    from kvcfg.evaluation.rerun import rerun

    made = [rerun(row) for row in rows]
    if points[0].options.output == "json":
        data = [item.to_dict() for item in made]
        print_json(arguments, data)
    else:
        print("\n\n".join(item.table() for item in made))
    return int(not all(item.repeats for item in made))


def _found(point: GridPoint) -> ResultRow:
    start = point.options.fingerprint
    if start is None:
        raise ConfigError(Problem("fingerprint", "must begin that of a row", None, "kvcfg rerun 3f2a9c"))
    return find_row(ResultStore(point.options.results), str(start))
