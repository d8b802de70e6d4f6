"""`kvcfg calibrate`: measure every model of the grid, write its file, and say what is in it."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.calibrating import calibrate
from kvcfg.evaluation.calibration_text import calibration_summary
from kvcfg.integrations.calibration_files import calibration_path


def calibrate_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """One file for each point; nothing runs if two of them would be the same file."""
    experiments = [point.experiment for point in points if point.experiment is not None]
    paths = [calibration_path(experiment) for experiment in experiments]
    for path in paths:
        if paths.count(path) > 1:
            rule = f"would be written by {paths.count(path)} points of the sweep, and only the last one would stay"
            raise ConfigError(Problem("quantization.calibration", rule, str(path), "one point at a time, without -m"))
    made = []
    for experiment, path in zip(experiments, paths, strict=True):
        calibration = calibrate(experiment)
        made.append((calibration.save(path), calibration))
    if points[0].options.output == "json":
        rows = [{"path": str(path), **calibration.to_dict()} for path, calibration in made]
        print_json(arguments, rows)
    else:
        print("\n\n".join(calibration_summary(path, calibration) for path, calibration in made))
    return 0
