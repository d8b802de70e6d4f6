"""`kvcfg export`: check that every point can be exported, print the exports, and write files whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.config.verbs import ExportOptions
from kvcfg.errors import ConfigError, Problem
from kvcfg.exporters import ENGINES, Export, export, export_all
from kvcfg.exporters.documents import write_whole
from kvcfg.exporters.engines import as_dicts
from kvcfg.exporters.engines_text import engines_table
from kvcfg.exporters.report import export_text

ALL = "all"


def export_points(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """One export in full, or all of a sweep; nothing is printed or written if any point cannot be exported."""
    _check(points)
    if points[0].options.engine == ALL:
        return _every_engine(arguments, points)
    made = _made(points)
    for point, item in zip(points, made, strict=True):
        if point.options.scales is not None:
            _write_scales(point)
        if point.options.out is not None:
            write_whole(Path(point.options.out).expanduser(), item.text)
    if points[0].options.output == "json":
        rows = [_as_dict(point, item) for point, item in zip(points, made, strict=True)]
        print_json(arguments, rows)
    else:
        texts = [export_text(item, point.options.out) for point, item in zip(points, made, strict=True)]
        heads = [f"{' '.join(point.overrides)}\n" if arguments.is_sweep else "" for point in points]
        print("\n\n".join(head + text for head, text in zip(heads, texts, strict=True)))
    return 0


def _check(points: Sequence[GridPoint]) -> None:
    """Refuse options that do not go together, before anything is done."""
    problems: list[Problem] = []
    for point in points:
        options: ExportOptions = point.options
        if options.engine == ALL:
            for key in ("version", "out", "scales"):
                if (value := getattr(options, key)) is not None:
                    rule = "is of one engine, and engine=all shows every one"
                    problems.append(Problem(key, rule, value, "engine=vllm"))
        else:
            problems += _unknown(options.engine)
    written = [point.options.out for point in points if point.options.out is not None]
    for path in dict.fromkeys(written):
        if written.count(path) > 1:
            rule = f"would be written by {written.count(path)} points of the sweep, and only the last one would stay"
            problems.append(Problem("out", rule, path, "one point at a time, without -m"))
    if len({point.options.engine == ALL for point in points}) > 1:
        problems.append(Problem("engine", "cannot be one choice of several: it shows every engine", ALL, "engine=all"))
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _unknown(engine: str) -> list[Problem]:
    try:
        ENGINES.check(engine)
    except ConfigError as error:
        return list(error.problems)
    return []


def _made(points: Sequence[GridPoint]) -> list[Export]:
    """Every export.

    Raises:
        ConfigError: with the problems of all points, each once.
    """
    made: list[Export] = []
    problems: dict[str, Problem] = {}
    for point in points:
        assert point.experiment is not None
        try:
            made.append(export(point.experiment, point.options.engine, point.options.version))
        except ConfigError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise ConfigError(problems.values())
    return made


def _every_engine(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    made = [export_all(point.experiment) for point in points if point.experiment is not None]
    if points[0].options.output == "json":
        rows = [
            {"overrides": point.overrides, "engines": as_dicts(item)} for point, item in zip(points, made, strict=True)
        ]
        print_json(arguments, rows)
    else:
        heads = [f"{' '.join(point.overrides)}\n" if arguments.is_sweep else "" for point in points]
        print("\n\n".join(head + engines_table(item) for head, item in zip(heads, made, strict=True)))
    return 0


def _as_dict(point: GridPoint, made: Export) -> dict[str, Any]:
    return {"overrides": point.overrides, "out": point.options.out, **made.to_dict()}


def _write_scales(point: GridPoint) -> None:
    from kvcfg.integrations.kv_scales import write_scales

    assert point.experiment is not None
    write_scales(point.experiment, point.options.scales)
