"""What each verb does with points that are known to be good. Torch is imported by those that run a model alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError, Problem

Run = Callable[[Arguments, Sequence[GridPoint]], int]


def plan_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """`kvcfg plan`: one plan in full, or one line of a table for each."""
    from kvcfg.planning import plan, plan_table

    if not arguments.is_sweep or _as_json(points):
        return _answer(arguments, points, plan)
    plans = [_attempt(plan, point) for point in points]
    print(plan_table([(point.overrides, made) for point, made in zip(points, plans, strict=True)]))
    return int(any(isinstance(made, ConfigError) for made in plans))


def fit_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """`kvcfg fit`: say for every point what would make it fit, or find the formats of its layers."""
    from kvcfg.config.recipes import finds_formats
    from kvcfg.planning import fit

    open_points = [point for point in points if point.experiment is not None and finds_formats(point.experiment)]
    if len(open_points) == len(points):
        from kvcfg.cli.fitted import find_all

        return find_all(arguments, points)
    if open_points:
        rule = "cannot be one choice of several: fit answers another question for the others"
        raise ConfigError(Problem("quantization", rule, "auto", "quantization=auto"))
    for point in points:
        if point.options.gate.max_kl is not None:
            rule = "is for quantization=auto, which finds formats; a workload fits whatever its cache loses"
            raise ConfigError(Problem("gate.max_kl", rule, point.options.gate.max_kl, "gate.max_kl=null"))
    return _answer(arguments, points, fit)


def fetch_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """`kvcfg fetch`: bring the weights of every model here, and print where they are."""
    from kvcfg.integrations.weights import fetch_weights

    models = {point.experiment.model.name: point.experiment.model for point in points if point.experiment}
    places = {name: fetch_weights(model) for name, model in models.items()}
    print(json.dumps(places) if _as_json(points) else "\n".join(f"{name}  {place}" for name, place in places.items()))
    return 0


def _bench_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.benched import bench_all

    return bench_all(arguments, points)


def _replay_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.replayed import replay_all

    return replay_all(arguments, points)


def _calibrate_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.calibrated import calibrate_all

    return calibrate_all(arguments, points)


def _evaluate_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.measured import evaluate_all

    return evaluate_all(arguments, points)


def _evaluate_one(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.measured import evaluate_one

    return evaluate_one(arguments, points)


def _export_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.exported import export_points

    return export_points(arguments, points)


def _import_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.imported import import_source

    return import_source(arguments, points)


def _diff_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.diffed import diff_sides

    return diff_sides(arguments, points)


def _rerun_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    from kvcfg.cli.rerun import rerun_row

    return rerun_row(arguments, points)


RUNS: dict[str, Run] = {
    "plan": plan_all,
    "fit": fit_all,
    "fetch": fetch_all,
    "eval": _evaluate_all,
    "bench": _bench_all,
    "replay": _replay_all,
    "calibrate": _calibrate_all,
    "export": _export_all,
    "import": _import_all,
    "diff": _diff_all,
    "rerun": _rerun_all,
}
"""What the command line does with a whole grid."""

JOBS: dict[str, Run] = RUNS | {"eval": _evaluate_one}
"""What one job of the verb's Hydra application does with its point."""


def _answer(arguments: Arguments, points: Sequence[GridPoint], function: Callable[[ExperimentConfig], Any]) -> int:
    """Print one result as it is; of a sweep, a JSON list, or a text for each with its overrides above it."""
    results = [_attempt(function, point) for point in points]
    if not arguments.is_sweep and isinstance(results[0], ConfigError):
        raise results[0]
    if _as_json(points):
        rows = [{"overrides": point.overrides, **_as_dict(made)} for point, made in zip(points, results, strict=True)]
        print_json(arguments, rows)
    elif arguments.is_sweep:
        texts = [f"{' '.join(point.overrides)}\n{_as_text(made)}" for point, made in zip(points, results, strict=True)]
        print("\n\n".join(texts))
    else:
        print(results[0].table())
    return int(any(isinstance(made, ConfigError) for made in results))


def _attempt(function: Callable[[ExperimentConfig], Any], point: GridPoint) -> Any:
    """The result for a point, or the error that shows only now, like a GPU that this machine does not have."""
    assert point.experiment is not None
    try:
        return function(point.experiment)
    except ConfigError as error:
        return error


def _as_dict(result: Any) -> dict[str, Any]:
    return {"error": str(result)} if isinstance(result, ConfigError) else result.to_dict()


def _as_text(result: Any) -> str:
    return str(result) if isinstance(result, ConfigError) else str(result.table())


def _as_json(points: Sequence[GridPoint]) -> bool:
    return bool(points[0].options.output == "json")
