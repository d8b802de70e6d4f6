"""What each verb does with points that are known to be good. Torch is imported by `eval` and `bench` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from kvcfg.cli.arguments import Arguments
from kvcfg.composition.points import GridPoint

Run = Callable[[Arguments, Sequence[GridPoint]], int]


def run_plan(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """Plan every point: one plan in full, or one line of a table for each."""
    from kvcfg.planning import plan, plan_table

    plans = [plan(_experiment(point)) for point in points]
    if arguments.is_sweep and not _as_json(points):
        print(plan_table([(point.overrides, made) for point, made in zip(points, plans, strict=True)]))
    else:
        _print(arguments, points, plans)
    return 0


def run_fit(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """Say for every point what would make it fit."""
    from kvcfg.planning import fit

    _print(arguments, points, [fit(_experiment(point)) for point in points])
    return 0


def run_fetch(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """Bring the weights of every model here, and print where they are."""
    from kvcfg.integrations.weights import fetch_weights

    models = {point.experiment.model.name: point.experiment.model for point in points if point.experiment}
    places = {name: fetch_weights(model) for name, model in models.items()}
    print(json.dumps(places) if _as_json(points) else "\n".join(f"{name}  {place}" for name, place in places.items()))
    return 0


def run_measured(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """Measure every point that has no row yet, then show the rows of all."""
    from kvcfg.cli.measured import measure_all

    return measure_all(arguments, points)


VERB_RUNS: dict[str, Run] = {
    "plan": run_plan,
    "fit": run_fit,
    "fetch": run_fetch,
    "eval": run_measured,
    "bench": run_measured,
}


def _print(arguments: Arguments, points: Sequence[GridPoint], results: Sequence[Any]) -> None:
    """One result as it is; of a sweep, a JSON list or a text for each with its overrides above it."""
    if _as_json(points):
        rows = [{"overrides": point.overrides, **made.to_dict()} for point, made in zip(points, results, strict=True)]
        print(json.dumps(rows if arguments.is_sweep else rows[0]))
    elif arguments.is_sweep:
        texts = [f"{' '.join(p.overrides)}\n{made.table()}" for p, made in zip(points, results, strict=True)]
        print("\n\n".join(texts))
    else:
        print(results[0].table())


def _as_json(points: Sequence[GridPoint]) -> bool:
    return bool(points[0].options.output == "json")


def _experiment(point: GridPoint) -> Any:
    assert point.experiment is not None
    return point.experiment
