"""A measured row once more: whether its figures repeat, and what else is not as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isclose
from typing import Any

from kvcfg.composition import compose
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError
from kvcfg.evaluation.measure import evaluate
from kvcfg.evaluation.sides import experiment_of
from kvcfg.results.row import ResultRow
from kvcfg.results.table import aligned

REPEATING = (
    "bytes_per_token_planned",
    "bytes_per_token_allocated",
    "bits_per_element",
    "bits_effective",
    "num_predictions",
    "ppl",
    "ppl_reference",
    "kl",
    "kl_p99",
    "top1",
)
"""Figures that are the same each time on the same machine with the same versions."""

TOLERANCE = 1e-6
"""Relative difference up to which a figure counts as the same."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of both runs.

    Attributes:
        name: the figure.
        before, now: its values.
        repeats: whether they are the same; None for speed, which never is.
    """

    name: str
    before: float
    now: float
    repeats: bool | None


@dataclass(frozen=True, slots=True)
class Rerun:
    """A row and what measuring it again gave.

    Attributes:
        before, now: the rows.
        notes: what is not as it was: versions, devices, presets.
    """

    before: ResultRow
    now: ResultRow
    notes: tuple[str, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every figure of both runs, speed last."""
        pairs = [(name, getattr(self.before, name), getattr(self.now, name)) for name in REPEATING]
        same = [Figure(name, one, two, isclose(one, two, rel_tol=TOLERANCE)) for name, one, two in pairs]
        speed = Figure("decode_tokens_per_s", self.before.decode_tokens_per_s, self.now.decode_tokens_per_s, None)
        return (*same, speed)

    @property
    def repeats(self) -> bool:
        """Whether every figure is the same, speed left out."""
        return all(figure.repeats is not False for figure in self.figures)

    def to_dict(self) -> dict[str, Any]:
        """The rerun as plain values that JSON can hold."""
        return {
            "fingerprint": self.before.fingerprint,
            "repeats": self.repeats,
            "figures": [asdict(figure) for figure in self.figures],
            "notes": list(self.notes),
            "row": asdict(self.now),
        }

    def table(self) -> str:
        """The rerun as text for people."""
        words = {True: "repeats", False: "differs", None: "speed"}
        rows = [(item.name, f"{item.before:.9g}", f"{item.now:.9g}", words[item.repeats]) for item in self.figures]
        said = "Every figure repeats." if self.repeats else "Not every figure repeats."
        head = f"{self.before.fingerprint[:12]}: {self.before.format} on {self.before.model}. {said}"
        return "\n".join([head, *self.notes, "", *aligned([("figure", "before", "now", ""), *rows], num_left=1)])


def rerun(row: ResultRow) -> Rerun:
    """Measure a row's config again.

    Raises:
        ConfigError: if its config cannot be any more, for example because weights or text are gone.
    """
    notes: list[str] = []
    experiment = _composed(row, notes)
    now = evaluate(experiment, overrides=row.overrides)
    notes += _versions(row, now)
    if now.fingerprint != row.fingerprint:
        notes.append(
            f"The fingerprint is another now, {now.fingerprint[:12]}: version, weights, text or calibration changed."
        )
    return Rerun(row, now, tuple(notes))


def _composed(row: ResultRow, notes: list[str]) -> ExperimentConfig:
    """The config as it was; what the stored overrides give now is only compared with it."""
    stored = experiment_of(row)
    try:
        if compose(row.overrides) != stored:
            notes.append(
                "The stored overrides compose to another config now: a preset has changed. The stored config was run."
            )
    except ConfigError as error:
        notes.append(f"The stored overrides do not compose any more ({error}). The stored config was run.")
    return stored


def _versions(before: ResultRow, now: ResultRow) -> Iterator[str]:
    if before.device != now.device:
        yield f"Measured on {before.device}, now on {now.device}."
    for name in dict.fromkeys((*before.versions, *now.versions)):
        one, two = before.versions.get(name, "none"), now.versions.get(name, "none")
        if one != two:
            yield f"{name} was {one}, and is {two}."
