"""The two sides of `kvcfg diff`: overrides, a file, an engine's command line, or a measured row. Torch-free."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcfg.composition import compose
from kvcfg.composition.spelling import quoted
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.problems import check
from kvcfg.errors import ConfigError, KvcfgError, Problem
from kvcfg.importers import read_config
from kvcfg.importers.sources import begins_like_an_engine, read_yaml
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore

_FINGERPRINT = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        label: how it was named.
        experiment: its config.
        row: what was measured with it; None if nothing was.
    """

    label: str
    experiment: ExperimentConfig
    row: ResultRow | None


def read_side(text: str, store: ResultStore, beside: Sequence[str] = (), key: str = "a") -> Side:
    """What a word on the command line means.

    Args:
        text: overrides, a file, an engine's command line, or how the fingerprint of a row begins.
        store: measured rows.
        beside: overrides for what is no row.
        key: which side it is, for errors.

    Raises:
        ConfigError: if it means nothing, or overrides stand beside a row.
    """
    path = Path(text).expanduser()
    if _FINGERPRINT.fullmatch(text) and not path.exists():
        return _of_row(text, find_row(store, text, key), beside)
    if path.suffix == ".json" and path.is_file():
        return _of_row(text, ResultRow.from_json(path.read_text(encoding="utf-8"), text), beside)
    if begins_like_an_engine(text) or (path.is_file() and not _is_preset(path)):
        return _measured(text, read_config(text, overrides=beside).experiment, store)
    words = list(preset_overrides(path)) if path.is_file() else shlex.split(text)
    return _measured(text, compose([*words, *beside]), store)


def find_row(store: ResultStore, start: str, key: str = "fingerprint") -> ResultRow:
    """The row whose fingerprint begins like that.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    rows = store.rows()
    found = [row for name, row in rows.items() if name.startswith(start)]
    if len(found) == 1:
        return found[0]
    if found:
        rule = f"begins the fingerprints of {len(found)} rows of {store.path}; write more of it"
        raise ConfigError(Problem(key, rule, start, f"{key}={found[0].fingerprint[: len(start) + 6]}"))
    if not rows:
        rule = f"is to be looked up in {store.path}, which has no rows; kvcfg eval adds some"
        raise ConfigError(Problem(key, rule, start, "results=FILE"))
    last = list(rows)[-1]
    rule = f"begins no fingerprint of the {len(rows)} rows of {store.path}"
    raise ConfigError(Problem(key, rule, start, f"{key}={last[:12]}"))


def experiment_of(row: ResultRow) -> ExperimentConfig:
    """The config that a row was measured with.

    Raises:
        KvcfgError: if this version knows no such config any more.
    """
    experiment, problems = check(row.config)
    if experiment is None or problems:
        told = "; ".join(map(str, problems))
        raise KvcfgError(
            f"row {row.fingerprint[:12]} is of kvcfg {row.versions.get('kvcfg')}, whose config differs: {told}"
        )
    return experiment


def preset_overrides(path: Path) -> Iterator[str]:
    """The overrides that a preset of the group `experiment` stands for."""
    data = read_yaml(path)
    for item in data.pop("defaults", None) or []:
        for group, choice in item.items() if isinstance(item, Mapping) else ():
            yield f"{str(group).removeprefix('override').strip().lstrip('/')}={choice}"
    yield from _leaves(data)


def _leaves(data: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}={quoted(value)}"


def _is_preset(path: Path) -> bool:
    """Whether a file holds groups of kvcfg, and not an engine's settings."""
    data = read_yaml(path)
    groups = {*ExperimentConfig.model_fields, "defaults"}
    return bool(data) and data.keys() <= groups and "kv_cache" not in (data.get("model") or {})


def _of_row(label: str, row: ResultRow, beside: Sequence[str]) -> Side:
    if beside:
        rule = "cannot change a row that was measured; compare it with overrides instead"
        raise ConfigError(Problem(beside[0], rule, ..., f'kvcfg diff {row.fingerprint[:12]} "{" ".join(beside)}"'))
    return Side(label, experiment_of(row), row)


def _measured(label: str, experiment: ExperimentConfig, store: ResultStore) -> Side:
    """A side with the newest row of exactly its config."""
    config = json.loads(json.dumps(experiment.model_dump(mode="json")))
    rows = [row for row in store.rows().values() if row.config == config]
    return Side(label, experiment, max(rows, key=lambda row: row.created, default=None))
