"""What differs between two configs: keys, bytes and capacity, what engines are told, what was measured. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvcfg.errors import ConfigError
from kvcfg.evaluation.replay import replay_trace
from kvcfg.evaluation.sides import Side
from kvcfg.exporters import ENGINES, export
from kvcfg.planning.plans import Plan, plan

MEASURED = ("kl", "kl_p99", "ppl", "top1", "clip_rate", "bytes_per_token_allocated", "decode_tokens_per_s")
"""Figures of a row that are compared."""

REFUSED = "refused"
"""Stands for all settings of an engine that cannot store a cache so; its value is the reason."""

TRACED = "plan"
"""The capacity for which a trace is replayed."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same on both sides.

    Attributes:
        name: key, figure or setting.
        a, b: its values; None where a side has none.
    """

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that differs between two sides.

    Attributes:
        a, b: the sides.
        config: keys of the config.
        planned: figures of the plan; empty where a side cannot be planned.
        engines: settings that an engine is told, by engine; of a side that it refuses the reason alone.
        measured: figures of rows, and hit rates where both name a trace.
        notes: why something could not be compared.
    """

    a: Side
    b: Side
    config: tuple[Difference, ...]
    planned: tuple[Difference, ...]
    engines: Mapping[str, tuple[Difference, ...]]
    measured: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain values that JSON can hold."""
        return {
            "a": {"label": self.a.label, "row": None if self.a.row is None else self.a.row.fingerprint},
            "b": {"label": self.b.label, "row": None if self.b.row is None else self.b.row.fingerprint},
            "config": [asdict(item) for item in self.config],
            "planned": [asdict(item) for item in self.planned],
            "engines": {engine: [asdict(item) for item in items] for engine, items in self.engines.items()},
            "measured": [asdict(item) for item in self.measured],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The comparison as text for people."""
        from kvcfg.evaluation.comparison_text import comparison_text

        return comparison_text(self)


def compare_sides(a: Side, b: Side) -> Comparison:
    """Compare two sides; nothing is measured, and nothing is written."""
    notes: list[str] = []
    config = tuple(_differences(*(_flat(side.experiment.model_dump(mode="json")) for side in (a, b))))
    plans = _planned(a, b, notes)
    planned = tuple(_differences(*map(_figures, plans))) if plans else ()
    engines = _engines(a, b, notes)
    measured = (*_rows(a, b, notes), *_hit_rates(a, b))
    return Comparison(a, b, config, planned, engines, measured, tuple(notes))


def _planned(a: Side, b: Side, notes: list[str]) -> tuple[Plan, Plan] | None:
    try:
        return plan(a.experiment), plan(b.experiment)
    except ConfigError as error:
        notes.append(f"no plan: {error}")
        return None


def _figures(planned: Plan) -> dict[str, Any]:
    return {
        "fits": planned.fits,
        "bytes_per_token": planned.bytes_per_token,
        "bytes_per_page": planned.bytes_per_page,
        "num_pages": planned.num_pages,
        "num_tokens": planned.num_tokens,
        "max_sequences": planned.max_sequences,
        "kv_bytes": planned.kv_bytes,
        "kv_bytes_per_device": planned.kv_bytes_per_device,
        "free_bytes_per_device": planned.free_bytes_per_device,
        "max_tokens_per_s": planned.roofline.max_tokens_per_s,
    }


def _engines(a: Side, b: Side, notes: list[str]) -> dict[str, tuple[Difference, ...]]:
    found = {engine: (_told(a, engine), _told(b, engine)) for engine in ENGINES}
    neither = [engine for engine, told in found.items() if all(REFUSED in settings for settings in told)]
    if neither:
        notes.append(f"Neither can be exported to {', '.join(neither)}; kvcfg export says why.")
    differing = {engine: tuple(_told_apart(*told)) for engine, told in found.items() if engine not in neither}
    return {engine: items for engine, items in differing.items() if items}


def _told(side: Side, engine: str) -> dict[str, Any]:
    try:
        return _flat(export(side.experiment, engine).settings)
    except ConfigError as error:
        return {REFUSED: "; ".join(problem.rule for problem in error.problems)}


def _told_apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """What settings differ in, or only the refusal where one side has no settings."""
    if REFUSED in a or REFUSED in b:
        yield Difference(REFUSED, a.get(REFUSED), b.get(REFUSED))
    else:
        yield from _differences(a, b)


def _rows(a: Side, b: Side, notes: list[str]) -> Iterator[Difference]:
    for side in (a, b):
        if side.row is None:
            notes.append(f"There is no row of {side.label}: kvcfg eval measures one.")
    if a.row is None or b.row is None:
        return
    if a.row.text_sha != b.row.text_sha:
        notes.append("the rows were measured on different text, and their figures do not compare")
    yield from _differences(*({name: getattr(side.row, name) for name in MEASURED} for side in (a, b)))


def _hit_rates(a: Side, b: Side) -> Iterator[Difference]:
    if a.experiment.workload.trace is None or b.experiment.workload.trace is None:
        return
    rates = [replay_trace(side.experiment, capacities=(TRACED,)).rows[0].hit_rate for side in (a, b)]
    if rates[0] != rates[1]:
        yield Difference("hit_rate", *rates)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            yield Difference(name, a.get(name), b.get(name))


def _flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat
