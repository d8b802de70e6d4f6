"""What the fields of a pydantic model take, in words, and which of those values is nearest to a refused one."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvcfg.errors import nearest, one_of, show

Path = tuple[str | int, ...]

NOTHING: Any = ...
"""There is no value to show, not even null."""


class Accepted(NamedTuple):
    """What a field takes.

    Attributes:
        rule: in words.
        choices: the values it is one of, if they can be listed.
        number: int or float if it is a number.
        low, high: smallest and largest number taken; None without a bound, or with one that is itself excluded.
        nullable: whether null is taken.
        default: what it is when nothing is said; NOTHING if that cannot be written in an override.
    """

    rule: str
    choices: tuple[Any, ...] = ()
    number: type | None = None
    low: float | None = None
    high: float | None = None
    nullable: bool = False
    default: Any = NOTHING

    def nearest_to(self, value: Any) -> Any:
        """The taken value nearest to a refused one; NOTHING if none comes to mind."""
        if self.choices and isinstance(value, str) and (close := nearest(value, [show(item) for item in self.choices])):
            return close
        if self.number is not None and (near := self._nearest_number(value)) is not None:
            return near
        if self.default is not NOTHING and (self.default is not None or self.nullable):
            return self.default
        return self.choices[0] if self.choices else self.low if self.low is not None else NOTHING

    def _nearest_number(self, value: Any) -> float | None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        if isinstance(value, bool) or number != number:
            return None
        if self.low is not None and number < self.low:
            return self.low
        if self.high is not None and number > self.high:
            return self.high
        is_whole_in_range = self.number is int and abs(number) < float("inf") and self._holds(int(number))
        return int(number) if is_whole_in_range else None

    def _holds(self, number: float) -> bool:
        return (self.low is None or number >= self.low) and (self.high is None or number <= self.high)


def accepted(field: FieldInfo) -> Accepted:
    """What a field takes."""
    kinds, nullable, bounds = _alternatives(field.annotation, field.metadata)
    kind = kinds[0] if kinds else str
    if choices := _choices(kind):
        names = dict.fromkeys([show(item) for item in choices] + ["null"] * nullable)
        rule = one_of(list(names)) if kind is not bool else one_of(list(names)).replace("one of ", "")
        return Accepted(rule, choices, nullable=nullable, default=written_default(field))
    rule, number, low, high = _in_words(kind, bounds)
    rule = f"{rule} or null" if nullable else rule
    return Accepted(rule, (), number, low, high, nullable, written_default(field))


def written_default(field: FieldInfo) -> Any:
    """The default of a field as an override would say it; NOTHING if there is none that one would write."""
    if field.is_required():
        return NOTHING
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Enum):
        return default.value
    return NOTHING if isinstance(default, BaseModel | Mapping | list | tuple) else default


def field_at(model: type[BaseModel], path: Path) -> FieldInfo | None:
    """The field that a path of names and list indices leads to, or None."""
    depth, owner = deepest(model, path)
    return owner.model_fields.get(str(path[depth])) if depth == len(path) - 1 else None


def deepest(model: type[BaseModel], path: Path) -> tuple[int, type[BaseModel]]:
    """How many parts of the path lead through models, and the last of these models."""
    depth = 0
    while depth < len(path) - 1:
        field = model.model_fields.get(str(path[depth]))
        inner = None if field is None else model_in(field.annotation)
        if inner is None:
            break
        is_index = isinstance(path[depth + 1], int) and depth + 2 < len(path)
        depth, model = depth + (2 if is_index else 1), inner
    return depth, model


def model_in(annotation: Any) -> Any:
    """The model in an annotation, through Annotated, unions with None, lists and tuples; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := model_in(argument)) is not None), None)


def section_in(annotation: Any) -> Any:
    """The model of a field that is one section, not a list of them; None if it is no section."""
    kind = without_null(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def without_null(annotation: Any) -> Any:
    """The annotation without Annotated and without the None of `X | None`."""
    if hasattr(annotation, "__metadata__"):
        return without_null(annotation.__origin__)
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    kept = [item for item in get_args(annotation) if item is not type(None)]
    return without_null(kept[0]) if len(kept) == 1 else annotation


def takes_null(annotation: Any) -> bool:
    """Whether null is among the values."""
    return type(None) in get_args(annotation)


def path_of(key: str) -> Path:
    """`model.layer_groups.0.window` as names and indices."""
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _in_words(kind: Any, bounds: Mapping[str, float]) -> tuple[str, type | None, float | None, float | None]:
    """The rule of one type, and if it is a number which kind, with its bounds."""
    if kind in (int, float):
        rule, low, high = _range(kind, bounds)
        return rule, kind, low, high
    if get_origin(kind) in (list, tuple, set, frozenset):
        rule = "must be a list, like [a,b]"
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        rule = f"must be a section with {', '.join(kind.model_fields)}"
    else:
        rule = "must be text"
    return rule, None, None, None


def _alternatives(annotation: Any, metadata: Sequence[Any]) -> tuple[list[Any], bool, dict[str, float]]:
    """The types a field takes without null, whether it takes null, and its bounds by name (ge, gt, le, lt)."""
    bounds = {
        name: getattr(item, name)
        for item in _constraints(metadata)
        for name in ("ge", "gt", "le", "lt")
        if getattr(item, name, None) is not None
    }
    if hasattr(annotation, "__metadata__"):
        kinds, nullable, inner = _alternatives(annotation.__origin__, annotation.__metadata__)
        return kinds, nullable, bounds | inner
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation], False, bounds
    kinds, nullable = [], False
    for argument in get_args(annotation):
        if argument is type(None):
            nullable = True
        else:
            found, null, inner = _alternatives(argument, ())
            kinds, nullable, bounds = kinds + found, nullable or null, bounds | inner
    return kinds, nullable, bounds


def _constraints(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from _constraints(item.metadata) if isinstance(item, FieldInfo) else (item,)


def _choices(kind: Any) -> tuple[Any, ...]:
    if kind is bool:
        return (True, False)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(member.value for member in kind)
    return ()


def _range(kind: type, bounds: Mapping[str, float]) -> tuple[str, float | None, float | None]:
    noun = "a whole number" if kind is int else "a number"
    low, high = bounds.get("ge"), bounds.get("le")
    if kind is int:
        low = bounds["gt"] + 1 if "gt" in bounds else low
        high = bounds["lt"] - 1 if "lt" in bounds else high
    above, below = (None, None) if kind is int else (bounds.get("gt"), bounds.get("lt"))
    if low is not None and high is not None:
        return f"must be {noun} between {low:g} and {high:g}", low, high
    parts = [
        f"{word} {bound:g}"
        for word, bound in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    limits = " and ".join(parts)
    return f"must be {noun}{' of' if limits.startswith('at') else ''} {limits}".rstrip(), low, high
