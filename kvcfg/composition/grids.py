"""A grid of experiments in the time of a few compositions.

Composing takes tens of milliseconds, a grid has thousands of points. But the presets of one group say nothing
about another group, so every choice is composed once, every swept value is typed once, and a point is put
together from their results. What does not fit this picture is composed as the base of a smaller grid: presets
that write outside their group (experiments do), values that are computed from others, keys that overlap.
Every point is what `compose` makes of its overrides, errors included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from kvcfg.composition.composer import Composer, Loaded, interpolates, plain_data, scratch_copy, value_text
from kvcfg.composition.points import GridPoint, check_point, compose_point, experiment_data
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.fields import field_at, model_in, path_of, section_in
from kvcfg.errors import ConfigError, Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

GROUPS = tuple(ExperimentConfig.model_fields)
OPTIONS = "options"


@dataclass(frozen=True, slots=True)
class Axis:
    """One override of a grid and the values it runs through.

    Attributes:
        key: what is overridden.
        values: one override a value.
        kind: `group` for the choice of a preset, `value` for a leaf, `base` for what must be composed as it is.
    """

    key: str
    values: tuple[Override, ...]
    kind: str

    @property
    def part(self) -> str:
        """The group that the axis changes; the verb's options are one more."""
        first = self.key.split(".")[0]
        return first if first in GROUPS else OPTIONS


class Entangled(Exception):
    """The axis at this place reaches outside its group and has to be composed as it is."""

    def __init__(self, place: int) -> None:
        self.place = place


def expand(composer: Composer, overrides: Sequence[str]) -> list[GridPoint]:
    """Every combination of what the overrides run through, in the order of Hydra's basic sweeper.

    Raises:
        ConfigError: if overrides cannot be read, or a sweep has no values.
    """
    axes = _axes(composer, overrides)
    while True:
        try:
            return _points(composer, axes)
        except Entangled as found:
            axes[found.place] = Axis(axes[found.place].key, axes[found.place].values, "base")


def _axes(composer: Composer, overrides: Sequence[str]) -> list[Axis]:
    parsed, problems = composer.parse(overrides)
    if problems:
        raise ConfigError(problems.values())
    # As in Hydra, of two overrides with one key the later counts, at the place of the first.
    runs = {override.get_key_element(): composer.values(override) for override in parsed.values()}
    values = [tuple(composer.parse(lines)[0].values()) for lines in runs.values()]
    keys = [choices[0].key_or_group for choices in values]
    return [
        Axis(key, choices, _kind(composer, choices, [other for other in keys if other is not key]))
        for key, choices in zip(keys, values, strict=True)
    ]


def _kind(composer: Composer, values: Sequence[Override], others: Sequence[str]) -> str:
    key = values[0].key_or_group
    is_plain = not any(item.package or item.is_add() or item.is_delete() or item.is_force_add() for item in values)
    if len(values) == 1 or not is_plain:
        return "base"
    if key in GROUPS:
        return "group" if composer.choices(key) else "base"
    field = field_at(composer.root, path_of(key))
    is_leaf = field is not None and model_in(field.annotation) is None and not any(map(str.isdigit, key.split(".")))
    is_constant = all("${" not in value_text(item) and "???" not in value_text(item) for item in values)
    is_scalar = not any(isinstance(item.value(), dict) for item in values)
    is_alone = not any(other.startswith(f"{key}.") or key.startswith(f"{other}.") or other == key
                       for other in others if other not in GROUPS)  # fmt: skip
    return "value" if is_leaf and is_constant and is_scalar and is_alone else "base"


def _points(composer: Composer, axes: Sequence[Axis]) -> list[GridPoint]:
    bases: dict[tuple[int, ...], _Base] = {}
    base_places = [place for place, axis in enumerate(axes) if axis.kind == "base"]
    points = []
    for steps in product(*(range(len(axis.values)) for axis in axes)):
        step_of_base = tuple(steps[place] for place in base_places)
        if step_of_base not in bases:
            chosen = {place: axes[place].values[steps[place]] for place in base_places}
            bases[step_of_base] = _Base(composer, axes, chosen)
        points.append(bases[step_of_base].point(steps))
    return points


class _Choice(NamedTuple):
    """A preset once composed: the values of its group and what is missing among them; or why it cannot be."""

    data: Any
    missing: list[Problem]
    refused: Problem | None = None


class _Base:
    """What all points with the same base overrides share, and the parts that they are put together from."""

    def __init__(self, composer: Composer, axes: Sequence[Axis], chosen: Mapping[int, Override]) -> None:
        self.composer, self.axes = composer, axes
        loaded = composer.load(chosen)
        self.told = loaded.problems
        self.refused = {chosen[place].key_or_group for place in self.told}
        self.is_simple = not interpolates(loaded.config)
        self.data, self.missing = plain_data(loaded.config)
        self.given = [axis.key for axis in axes]
        self.accepted = {place: item for place, item in chosen.items() if place not in self.told}
        self.choices = {place: self._compose_each(place, loaded) for place in self._places("group")}
        self.typed = {place: self._type_each(axes[place], loaded) for place in self._places("value")}
        self.parts: dict[tuple[str, tuple[int, ...]], Any] = {}

    def point(self, steps: Sequence[int]) -> GridPoint:
        """The point at one step of every axis."""
        overrides = [str(axis.values[step].input_line) for axis, step in zip(self.axes, steps, strict=True)]
        if not self.is_simple:
            return compose_point(self.composer, overrides)
        told, refused = dict(self.told), set(self.refused)
        for place, axis in enumerate(self.axes):
            problem = self._refusal(axis, place, steps[place])
            if problem is not None:
                told[place] = problem
                refused.add(axis.key)
        data: dict[str, Any] = {}
        for part in (*GROUPS, OPTIONS):
            made = self._part(part, steps)
            data |= made if part == OPTIONS else {part: made}
        problems = [told[place] for place in sorted(told)] + self._missing(steps)
        return check_point(overrides, data, problems, self.composer.options, refused, self.given)

    def _places(self, kind: str) -> list[int]:
        return [place for place, axis in enumerate(self.axes) if axis.kind == kind]

    def _compose_each(self, place: int, base: Loaded) -> list[_Choice]:
        """Every preset of a group axis, composed alone; raises Entangled if one of them is not independent."""
        key, made = self.axes[place].key, []
        for override in self.axes[place].values:
            loaded = self.composer.load(dict(sorted({**self.accepted, place: override}.items())))
            if place in loaded.problems:
                made.append(_Choice(None, [], loaded.problems[place]))
                continue
            data, missing = plain_data(loaded.config)
            reaches_out = _without(data, key) != _without(self.data, key) or interpolates(loaded.config)
            if loaded.problems or reaches_out or _without(loaded.choices, key) != _without(base.choices, key):
                raise Entangled(place)
            made.append(_Choice(data[key], [item for item in missing if item.key.startswith(f"{key}.")]))
        return made

    def _type_each(self, axis: Axis, base: Loaded) -> list[Any]:
        """Every value of a value axis as the config keeps it, or the problem that says why it does not."""
        config = scratch_copy(base.config)
        return [self.composer.apply(config, override) for override in axis.values]

    def _refusal(self, axis: Axis, place: int, step: int) -> Problem | None:
        if axis.kind == "group":
            return self.choices[place][step].refused
        found = self.typed[place][step] if axis.kind == "value" else None
        return found if isinstance(found, Problem) else None

    def _part(self, part: str, steps: Sequence[int]) -> Any:
        """One group of a point: checked if it can be, else its plain values; made once for all points alike."""
        places = [place for place, axis in enumerate(self.axes) if axis.kind != "base" and axis.part == part]
        state = (part, tuple(steps[place] for place in places))
        if state not in self.parts:
            self.parts[state] = self._make_part(part, {place: steps[place] for place in places})
        return self.parts[state]

    def _make_part(self, part: str, steps: Mapping[int, int]) -> Any:
        data = {key: value for key, value in self.data.items() if key not in GROUPS or key == part}
        if part != OPTIONS:
            data = {part: self.data.get(part, {})}
        for place, step in steps.items():
            if self.axes[place].kind == "group" and self.choices[place][step].refused is None:
                data = {part: self.choices[place][step].data}
        for place, step in steps.items():
            value = self.typed[place][step] if self.axes[place].kind == "value" else Problem("", "")
            if not isinstance(value, Problem):
                data = _with(data, self.axes[place].key.split("."), value)
        if part == OPTIONS:
            return data
        plain = experiment_data(data, self.given)[part]
        model: type[BaseModel] = section_in(ExperimentConfig.model_fields[part].annotation)
        try:
            return model.model_validate(plain)
        except ValidationError:
            return plain

    def _missing(self, steps: Sequence[int]) -> list[Problem]:
        """What is missing at a point: in the base, less the groups that are chosen, plus what these lack."""
        swept = {self.axes[place].key: self.choices[place][steps[place]] for place in self.choices}
        replaced = {key for key, choice in swept.items() if choice.refused is None}
        found = [item for item in self.missing if item.key.split(".")[0] not in replaced]
        found += [item for choice in swept.values() for item in choice.missing]
        given = {self.axes[place].key for place, values in self.typed.items()
                 if not isinstance(values[steps[place]], Problem)}  # fmt: skip
        order = {key: index for index, key in enumerate(GROUPS)}
        kept = [item for item in found if item.key not in given]
        return sorted(kept, key=lambda item: order.get(item.key.split(".")[0], len(order)))


def _without(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}


def _with(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested data with one value set."""
    inner = value if len(path) == 1 else _with(data.get(path[0]) or {}, path[1:], value)
    return {**data, path[0]: inner}
