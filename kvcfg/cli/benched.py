"""`kvcfg bench`: the kernels of all points in one table, then decode steps of the models that are here in another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.machine import available_memory
from kvcfg.errors import KvcfgError
from kvcfg.evaluation.kernel_bench import has_kernels, measure_kernels
from kvcfg.evaluation.kernel_rows import KernelRow, kernel_table
from kvcfg.integrations.weights import has_weights
from kvcfg.units import readable_bytes

if TYPE_CHECKING:
    from kvcfg.evaluation.bench import SpeedRow

_T = TypeVar("_T")

_FLOAT32_BYTES = 4


def bench_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """Time every point; nothing is kept. Kernels are shown before models run; exit code 1 if a point has neither."""
    as_json = points[0].options.output == "json"
    kernels = _each(arguments, points, _why_no_kernels, _kernel_rows)
    table = [row for rows in kernels for row in rows or ()]
    if table and not as_json:
        print(kernel_table(table), flush=True)
    models = _each(arguments, points, _why_no_model, _decode_row)
    if as_json:
        data = [
            {
                "overrides": point.overrides,
                "kernels": [row.to_dict() for row in rows or ()],
                "model": None if speed is None else speed.to_dict(),
            }
            for point, rows, speed in zip(points, kernels, models, strict=True)
        ]
        print_json(arguments, data)
    elif any(models):
        from kvcfg.evaluation.bench import speed_table

        print("\n" * bool(table) + speed_table([speed for speed in models if speed is not None]))
    return int(any(rows is None and speed is None for rows, speed in zip(kernels, models, strict=True)))


def _each(
    arguments: Arguments,
    points: Sequence[GridPoint],
    why_not: Callable[[GridPoint], str | None],
    function: Callable[[GridPoint], _T],
) -> list[_T | None]:
    """The result for every point; None where it is not asked for, or cannot be had, which is told once for all."""
    results: list[_T | None] = []
    told = set[str]()
    for point in points:
        reason, result = why_not(point), None
        if reason is None:
            try:
                result = function(point)
            except KvcfgError as error:
                if not arguments.is_sweep:
                    raise
                reason = f"{' '.join(point.overrides)}: {error}"
        if reason and reason not in told:
            told.add(reason)
            print(f"kvcfg: {reason}", file=sys.stderr)
        results.append(result)
    return results


def _kernel_rows(point: GridPoint) -> list[KernelRow]:
    options = point.options
    return measure_kernels(_experiment(point), batch_size=options.batch_size, context=options.context)


def _decode_row(point: GridPoint) -> SpeedRow:
    from kvcfg.evaluation.bench import measure_speed

    return measure_speed(_experiment(point))


def _why_no_kernels(point: GridPoint) -> str | None:
    """Why the kernels of a point are not timed; empty if nobody asked for them, None if they are."""
    if point.options.measure != "auto":
        return None if point.options.measure == "kernels" else ""
    if has_kernels(_experiment(point)):
        return None
    return "kernels were not timed: they are the CPU's. Try: devices=cpu"


def _why_no_model(point: GridPoint) -> str | None:
    """Why decode steps of a point's model are not timed; empty if nobody asked for them, None if they are."""
    if point.options.measure != "auto":
        return None if point.options.measure == "model" else ""
    why = _why_it_cannot_run(_experiment(point))
    return None if why is None else f"decode steps of {_experiment(point).model.name} were not timed: {why}"


def _why_it_cannot_run(experiment: ExperimentConfig) -> str | None:
    model = experiment.model
    if find_spec("transformers") is None:
        return "they need transformers. Try: pip install 'kvcfg[hf]'"
    if not has_weights(model):
        if model.path or not (model.id or model.package):
            return "there are no weights to run. Try: model=hf model.path=/folder/with/config.json"
        return "its weights are not on this machine. Try: measure=model, which fetches them"
    needed = _FLOAT32_BYTES * model.n_params
    if has_kernels(experiment) and needed > available_memory():
        return f"its weights take {readable_bytes(needed)} as float32, more than is free. Try: measure=model"
    return None


def _experiment(point: GridPoint) -> ExperimentConfig:
    assert point.experiment is not None
    return point.experiment
