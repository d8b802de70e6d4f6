"""Verbs that measure: run what has no row yet, then show the rows of all points, and hold them to the gate."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvcfg.cli.arguments import Arguments
from kvcfg.composition.points import GridPoint
from kvcfg.config.verbs import GateOptions
from kvcfg.errors import ConfigError, GateError, Problem
from kvcfg.evaluation.fingerprint import fingerprint
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore
from kvcfg.results.table import render


def evaluate_all(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """`kvcfg eval`: measure in Hydra's jobs, so that its launchers work; print one table at the end."""
    options = points[0].options
    names = [_fingerprint(point) for point in points]
    baseline = _baseline(options.gate)
    store = ResultStore(options.results)
    if options.force or not names_in(store, names):
        from kvcfg.cli.hydra_app import run_app

        if (code := run_app(arguments)) != 0:
            return code
    rows = store.rows()
    found = [rows[name] for name in names if name in rows]
    if options.output == "json":
        data = [json.loads(row.to_json()) for row in found]
        print(json.dumps(data if arguments.is_sweep else data[0]))
    elif found:
        print(render(found))
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
    if options.force or store.find(_fingerprint(point)) is None:
        from kvcfg.evaluation.measure import evaluate

        assert point.experiment is not None
        own = type(options).model_fields
        overrides = [item for item in point.overrides if item.partition("=")[0].split(".")[0] not in own]
        store.append(evaluate(point.experiment, overrides=overrides))
    return 0


def names_in(store: ResultStore, names: Sequence[str]) -> bool:
    """Whether every fingerprint has a row."""
    return set(names) <= set(store.rows())


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
