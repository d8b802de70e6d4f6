"""Verbs that measure: run what has no row yet, then show the rows of all points, and hold them to the gate."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.config.verbs import EvalOptions, GateOptions
from kvcfg.errors import ConfigError, GateError, Problem, show
from kvcfg.evaluation.fingerprint import fingerprint
from kvcfg.evaluation.heat_map import draw_stored_errors
from kvcfg.evaluation.plot_files import check_plot
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore
from kvcfg.results.table import render
from kvcfg.results.task_table import render_tasks


def evaluate_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """`kvcfg eval`: measure in Hydra's jobs, so that its launchers work; print one table at the end."""
    options = points[0].options
    names = [_fingerprint(point) for point in points]
    baseline = _baseline(options.gate)
    _check_one_request(points)
    if options.plot is not None:
        check_plot(options.plot)
    store = ResultStore(options.results)
    before = store.rows()
    if options.force or not all(_is_finished(before.get(name), options) for name in names):
        from kvcfg.cli.hydra_app import run_app

        if (code := run_app(arguments)) != 0:
            return code
    rows = store.rows()
    found = [rows[name] for name in names if _is_finished(rows.get(name), options)]
    if options.output == "json":
        data = [json.loads(row.to_json()) for row in found]
        print_json(arguments, data)
    elif found:
        print(render(found))
        if options.tasks:
            print(f"\n{render_tasks(found, options.tasks)}")
    if options.plot is not None and found:
        draw_stored_errors(found, options.plot)
    refused = [reason for row in found if (reason := _refusal(row, options.gate, baseline)) is not None]
    failed = len(names) - len(found)
    if failed:
        refused.append(f"{failed} of {len(names)} points could not be measured; the reasons stand above")
    for reason in refused:
        print(f"kvcfg: {reason}", file=sys.stderr)
    return 1 if refused else 0


def evaluate_one(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """One job of `kvcfg eval`: add the row of one point, unless there is one."""
    point, options = points[0], points[0].options
    store = ResultStore(options.results)
    if options.force or not _is_finished(store.find(_fingerprint(point)), options):
        from kvcfg.evaluation.measure import evaluate
        from kvcfg.evaluation.retrieval.request import RetrievalRequest

        assert point.experiment is not None
        own = type(options).model_fields
        overrides = [item for item in point.overrides if item.partition("=")[0].split(".")[0] not in own]
        retrieval = RetrievalRequest(options.tasks or (), options.task_tokens, options.task_prompts)
        store.append(
            evaluate(point.experiment, overrides=overrides, retrieval=retrieval, by_head=options.plot is not None)
        )
    return 0


def _is_finished(row: ResultRow | None, options: EvalOptions) -> bool:
    """Whether there is a row that has all that is asked for: tasks of the same length and number, figures to plot."""
    asked = (options.task_prompts, options.task_tokens)
    scores = [((row and row.tasks) or {}).get(name) for name in options.tasks or ()]
    if row is None or (options.plot is not None and row.stored_error is None):
        return False
    return all(score is not None and (score.num_prompts, score.prompt_tokens) == asked for score in scores)


def _check_one_request(points: Sequence[GridPoint]) -> None:
    """Of two rows of one cache the later counts, so points of a sweep may not ask other tasks of the same one."""
    for key in ("tasks", "task_tokens", "task_prompts"):
        values = list(dict.fromkeys(getattr(point.options, key) for point in points))
        if len(values) > 1:
            rule = "must be the same at all points of a sweep; run one after the other, with a results=FILE.jsonl each"
            raise ConfigError(Problem(key, rule, ..., f"{key}={show(values[0])}"))


def _fingerprint(point: GridPoint) -> str:
    assert point.experiment is not None
    return fingerprint(point.experiment)


def _baseline(gate: GateOptions) -> ResultRow | None:
    if gate.baseline is None:
        return None
    try:
        text = Path(gate.baseline).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        rule = f"must be the JSON of an earlier row ({error.strerror}); kvcfg eval output=json prints one"
        raise ConfigError(Problem("gate.baseline", rule, gate.baseline, "gate.baseline=null")) from error
    return ResultRow.from_json(text, gate.baseline)


def _refusal(row: ResultRow, gate: GateOptions, baseline: ResultRow | None) -> str | None:
    """Why a row does not pass the gate, or None if it does."""
    try:
        row.require(max_kl=gate.max_kl)
    except GateError as error:
        return str(error)
    if baseline is None:
        return None
    for name in ("model", "text_sha"):
        if getattr(row, name) != getattr(baseline, name):
            return f"gate.baseline={gate.baseline} has {name} {getattr(baseline, name)}, this row {getattr(row, name)}"
    if not row.kl <= baseline.kl_ci[1]:
        low, high = baseline.kl_ci
        return (
            f"{row.format} on {row.model}: KL {row.kl:.3g} is above the baseline's {baseline.kl:.3g} "
            f"[{low:.3g}, {high:.3g}] ({gate.baseline})"
        )
    return None
