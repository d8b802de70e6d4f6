"""`kvcfg replay`: check every point of the grid, replay them one after the other, and print or draw them together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.plot_files import check_plot
from kvcfg.evaluation.progress import progress_bar
from kvcfg.evaluation.replay import TraceReplayer, read_trace
from kvcfg.evaluation.replay_job import ReplayJob, prepare
from kvcfg.evaluation.replay_plot import draw_replays
from kvcfg.evaluation.replay_text import replay_table


class _Ready(NamedTuple):
    point: GridPoint
    job: ReplayJob
    replayer: TraceReplayer


def replay_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """One replay in full, or one table for all; nothing is replayed if any point cannot be."""
    options = points[0].options
    if options.plot is not None:
        check_plot(options.plot)
    ready = _prepared(points)
    steps = sum(len(item.job.options.sizes) for item in ready)
    title = f"replaying {len(ready)} × {len(options.sizes)} capacities"
    with progress_bar(title, steps) if sys.stderr.isatty() else nullcontext(lambda: None) as step_done:
        results = [(item.point.overrides, item.replayer.replay(item.job, step_done)) for item in ready]
    if options.output == "json":
        rows = [{"overrides": list(overrides), **made.to_dict()} for overrides, made in results]
        print_json(arguments, rows)
    else:
        print(replay_table(results) if arguments.is_sweep else results[0][1].table())
    if options.plot is not None:
        draw_replays(results, options.plot, options.plot_axis)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0


def _prepared(points: Sequence[GridPoint]) -> list[_Ready]:
    """Every point with its trace read and its job made.

    Raises:
        ConfigError: with the problems of all points, each once.
    """
    replayers: dict[tuple[str | None, int], TraceReplayer] = {}
    ready: list[_Ready] = []
    problems: dict[str, Problem] = {}
    for point in points:
        experiment = point.experiment
        assert experiment is not None
        key = (experiment.workload.trace, experiment.workload.trace_block_size)
        try:
            if key not in replayers:
                replayers[key] = TraceReplayer(read_trace(experiment))
            ready.append(_Ready(point, prepare(experiment, point.options, replayers[key].trace), replayers[key]))
        except ConfigError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise ConfigError(problems.values())
    return ready
