"""`kvcfg fit quantization=auto`: find the formats of every layer, print them, and hold them to the gate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.errors import GateError
from kvcfg.evaluation.allocation import FoundFormats, find_formats


def find_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """The formats of every point of a sweep; exit code 1 where those of one lose more than they may."""
    found = [(point, _found(point)) for point in points]
    if points[0].options.output == "json":
        rows = [{"overrides": point.overrides, **made.to_dict()} for point, made in found]
        print_json(arguments, rows)
    elif arguments.is_sweep:
        print("\n\n".join(f"{' '.join(point.overrides)}\n{made.table()}" for point, made in found))
    else:
        print(found[0][1].table())
    refused = [reason for point, made in found if (reason := _refusal(point, made)) is not None]
    for reason in refused:
        print(f"kvcfg: {reason}", file=sys.stderr)
    return 1 if refused else 0


def _found(point: GridPoint) -> FoundFormats:
    assert point.experiment is not None
    return find_formats(point.experiment, max_kl=point.options.gate.max_kl)


def _refusal(point: GridPoint, made: FoundFormats) -> str | None:
    """Why what was measured does not pass the gate, or None if it does."""
    max_kl = point.options.gate.max_kl
    try:
        made.row.require(max_kl=max_kl)
    except GateError as error:
        return f"{error}, on other text than the formats were found on. Try: gate.max_kl={_stricter(max_kl, made):.2g}"
    return None


def _stricter(max_kl: float, made: FoundFormats) -> float:
    """A gate for which more bytes are taken, by as much as the prediction was too low."""
    return 0.95 * max_kl * made.kl_predicted / made.row.kl
