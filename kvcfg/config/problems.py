"""From what pydantic says to what a person should type: one Problem for every value that cannot be.

`check` is the whole way: plain composed data in, an experiment or all problems out. When single values are
refused, the rules that compare groups still run, on the defaults in their place, and only those rules speak
that read none of the refused keys: a second run should not bring problems that the first could have told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from kvcfg.config import rules
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.fields import NOTHING, Path, accepted, deepest, field_at, path_of, section_in, takes_null
from kvcfg.errors import ConfigError, Problem, nearest, show


def check(data: Mapping[str, Any], refused: Collection[str] = ()) -> tuple[ExperimentConfig | None, list[Problem]]:
    """Validate plain data.

    Args:
        data: groups of `ExperimentConfig`, as dictionaries.
        refused: keys that were refused before and hold defaults in `data`; rules that read them stay silent.

    Returns:
        The experiment and no problems, or None and every problem (none if `refused` is all there is).
    """
    if not refused:
        try:
            return ExperimentConfig.model_validate(data), []
        except ValidationError:
            pass  # told group by group below, so that one failing group does not hide the others
    groups = ExperimentConfig.model_fields
    problems = [unknown_key(ExperimentConfig, key, value) for key, value in data.items() if key not in groups]
    failing, values = set(refused), {}
    for name, info in groups.items():
        group = _check_group(name, section_in(info.annotation), data.get(name, {}))
        values[name] = group.value
        problems += [problem for problem in group.problems if problem.key not in refused]
        failing |= group.failing
    problems += rules.problems(ExperimentConfig.model_construct(**values), refused=failing)
    return None, problems


def check_options(model: type[BaseModel], data: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Validate the options of a verb, whose keys stand at the root: the options, or None and every problem."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        return None, list(_told(model, error))


def refusal(model: type[BaseModel], key: str, value: Any) -> Problem:
    """The problem of a value that its field does not take: what it takes, and the nearest value that it does."""
    field = field_at(model, path_of(key))
    if field is None:
        return unknown_key(model, key, value)
    takes = accepted(field)
    return Problem(key, takes.rule, value, _override(key, takes.nearest_to(value)))


def missing(model: type[BaseModel], key: str) -> Problem:
    """The problem of a value that must be given and is not."""
    field = field_at(model, path_of(key))
    if field is None:
        return Problem(key, "must be given")
    takes = accepted(field)
    return Problem(key, f"must be given; it {takes.rule}", fix=_override(key, takes.nearest_to(NOTHING)))


def unknown_key(model: type[BaseModel], key: str, value: Any = NOTHING) -> Problem:
    """The problem of a key that does not exist: the names that do, and the nearest of them."""
    path = path_of(key)
    depth, owner = deepest(model, path)
    names = list(owner.model_fields)
    better = _elsewhere(model, str(path[-1]))
    if better is None and (close := nearest(path[depth], names)) is not None:
        better = ".".join(str(part) for part in (*path[:depth], close, *path[depth + 1 :]))
    if better is None and depth == 0:
        better = _elsewhere(model, str(path[-1]), nearly=True)
    where = ".".join(str(part) for part in path[:depth])
    rule = f"is no key; {where} has {', '.join(names)}" if where else f"is no key; there are {', '.join(names)}"
    if better is None or field_at(model, path_of(better)) is None:
        return Problem(key, rule, value)
    shown = NOTHING if isinstance(value, Mapping) else value
    return Problem(key, rule, value, better if shown is NOTHING else _override(better, shown))


class _Group(NamedTuple):
    value: Any
    problems: list[Problem]
    failing: set[str]


def _check_group(name: str, model: type[BaseModel], data: Any) -> _Group:
    """One group: its value, or the value it would have with defaults in the place of what is refused."""
    try:
        return _Group(model.model_validate(data), [], set())
    except ValidationError as error:
        problems = list(_told(ExperimentConfig, error, name))
        is_about_the_whole = any(not item["loc"] for item in error.errors())
    refused = {problem.key for problem in problems}
    stand_in = data
    for key in refused:
        stand_in = _with_default(model, stand_in, key.split(".")[1:])
    value: Any
    try:
        value = model.model_validate(stand_in)
    except ValidationError as error:
        if not is_about_the_whole:  # a check of the whole group runs only once all single values are right
            problems += [item for item in _told(ExperimentConfig, error, name) if not _mentions(item, refused)]
        value, refused = model(), {name}
    return _Group(value, problems, refused)


def _with_default(model: type[BaseModel], data: Any, path: Sequence[str]) -> Any:
    """A copy of a group's data with the default in the place of one value, or of the list that it is in."""
    field = model.model_fields.get(path[0]) if path else None
    if not isinstance(data, Mapping) or not path:
        return {}
    kept = {key: value for key, value in data.items() if key != path[0]}
    inner = None if field is None else section_in(field.annotation)
    if inner is not None and len(path) > 1:
        return kept | {path[0]: _with_default(inner, data.get(path[0]), path[1:])}
    if field is None or field.is_required():
        return kept
    return kept | {path[0]: field.get_default(call_default_factory=True)}


def _told(model: type[BaseModel], error: ValidationError, *places: str) -> Iterator[Problem]:
    """Every error of a failed validation as a Problem, its key under `places`."""
    errors = error.errors(include_url=False)
    for item in errors:
        loc = item["loc"]
        # A list with a bad item is also called too short by pydantic, which counts the good ones.
        if not any(len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in errors):
            yield from _translate(model, (*places, *loc), item)


def _translate(model: type[BaseModel], loc: Path, error: Any) -> Iterator[Problem]:
    context = error.get("ctx", {})
    raised = context.get("error")
    key, value = ".".join(str(part) for part in loc), error["input"]
    if error["type"] == "kvcfg":
        yield from _placed(model, context["problems"], loc)
    elif isinstance(raised, ConfigError):
        yield from _placed(model, raised.problems, loc)
    elif error["type"] == "extra_forbidden":
        yield unknown_key(model, key, value)
    elif error["type"] == "missing":
        yield missing(model, key)
    elif error["type"] == "value_error":
        yield Problem(key, str(raised), value, refusal(model, key, value).fix)
    else:
        yield refusal(model, key, value)


def _placed(model: type[BaseModel], problems: Sequence[Problem], loc: Path) -> Iterator[Problem]:
    """Problems whose keys are relative to the place where they were raised, with their full keys."""
    places = [str(part) for part in loc]

    def full(key: str) -> str:
        parts = key.split(".")
        overlap = next((n for n in range(min(len(parts), len(places)), 0, -1) if places[-n:] == parts[:n]), 0)
        return ".".join([*places, *parts[overlap:]])

    for problem in problems:
        place, fix = full(problem.key), problem.fix
        if fix is not None and "=" in fix:
            key, _, value = fix.partition("=")
            fix = f"{full(key)}={value}"
        elif fix is None and problem.value is not None and _may_be_null(model, place):
            fix = f"{place}=null"
        yield Problem(place, problem.rule, problem.value, fix)


def _may_be_null(model: type[BaseModel], key: str) -> bool:
    field = field_at(model, path_of(key))
    return field is not None and takes_null(field.annotation)


def _elsewhere(model: type[BaseModel], leaf: str, *, nearly: bool = False) -> str | None:
    """In which group a key of that name, or nearly that name, is found."""
    known = {
        name: f"{group}.{name}"
        for group, info in model.model_fields.items()
        if (inner := section_in(info.annotation)) is not None
        for name in inner.model_fields
    }
    return known.get(leaf if not nearly else str(nearest(leaf, list(known))))


def _override(key: str, value: Any) -> str | None:
    return None if value is NOTHING else f"{key}={show(value)}"


def _mentions(problem: Problem, refused: Collection[str]) -> bool:
    return any(key.rpartition(".")[2] in str(problem) for key in refused)
