"""Overrides to checked experiments: one at a time, a grid of them, and back to overrides.

    overrides ──Composer──► composed data ──check──► ExperimentConfig
         │ cannot be read         │ missing            │ range, name, rule
         │ no such key or choice  │                    │
         └────────────────────────┴────────────────────┴──► Problems, all of a run in one ConfigError
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from kvcfg.composer import Composer, plain_data, several_values
from kvcfg.config.base import Config
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.fields import section_in
from kvcfg.config.problems import check, check_options
from kvcfg.config.structured import to_plain
from kvcfg.errors import ConfigError, Problem, show

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One combination of a sweep: an experiment, or the error that says why there is none.

    Attributes:
        overrides: what the point is composed from.
        experiment: what was asked for; None if it cannot be.
        error: every problem; None if there is none.
        options: the verb's own keys, if the grid is of a verb.
    """

    overrides: tuple[str, ...]
    experiment: ExperimentConfig | None = None
    error: ConfigError | None = None
    options: Any = None


def compose(
    overrides: Sequence[str] = (), *, config_name: str = "config", config_dir: str | Path | None = None
) -> ExperimentConfig:
    """Compose the groups under `conf/` with overrides, as on the command line, and check the result.

    Args:
        overrides: group choices and values: `["cache=fp8", "cache.kv_cache_page_size=64"]`.
        config_name: the root: `config`, or a verb, whose own keys are then allowed too.
        config_dir: folder with presets of your own, group folders inside.

    Raises:
        ConfigError: with every problem, each with an override that would mend it.
    """
    point = compose_point(Composer(config_name, config_dir), overrides)
    if point.experiment is None:
        raise point.error or ConfigError(())
    return point.experiment


def validate(config: DictConfig, *, prefix: str = "", overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Check what another Hydra application composed, wherever in its config it lies.

    Args:
        config: the node that holds the groups.
        prefix: path of that node in the application, so that errors name keys as they are written there.
        overrides: what was overridden on its command line; only needed with `cache.config_file`, so that an
            override that repeats a default still wins over the file.

    Raises:
        ConfigError: with every problem.
    """
    data, problems = plain_data(config)
    given = [_key_of(override).removeprefix(f"{prefix}.") for override in overrides]
    point = check_point((), data, problems, given=given)
    if point.experiment is None:
        raise (point.error or ConfigError(())).under(prefix)
    return point.experiment


def compose_point(composer: Composer, overrides: Sequence[str]) -> GridPoint:
    """Compose and check one combination, whatever is wrong with it."""
    parsed, told = composer.parse(overrides)
    sweeps = {index: override for index, override in parsed.items() if override.is_sweep_override()}
    told |= {index: several_values(override) for index, override in sweeps.items()}
    loaded = composer.load({index: item for index, item in parsed.items() if index not in sweeps})
    told |= loaded.problems
    data, missing = plain_data(loaded.config)
    problems = [told[index] for index in sorted(told)] + missing
    refused = {parsed[index].key_or_group for index in told if index in parsed}
    given = [override.key_or_group for override in parsed.values()]
    return check_point(overrides, data, problems, composer.options, refused, given)


def check_point(
    overrides: Sequence[str],
    data: Mapping[str, Any],
    problems: Sequence[Problem],
    options: type[Config] | None = None,
    refused: Collection[str] = (),
    given: Collection[str] = (),
) -> GridPoint:
    """Check composed data.

    Args:
        overrides: what it was composed from.
        data: plain values by group; a group may also be a checked model.
        problems: what is known to be wrong already; those values are not in `data`.
        options: the model of the verb's keys, which stand beside the groups.
        refused: further keys that hold defaults because what was given was refused.
        given: keys that were written on the command line.
    """
    own = {key: value for key, value in data.items() if options is not None and key in options.model_fields}
    groups = experiment_data({key: value for key, value in data.items() if key not in own}, given)
    experiment, more = check(groups, {*refused, *(problem.key for problem in problems)})
    checked_options, still_more = (None, []) if options is None else check_options(options, own)
    if found := [*problems, *more, *still_more]:
        return GridPoint(tuple(overrides), error=ConfigError(found))
    return GridPoint(tuple(overrides), experiment, options=checked_options)


def experiment_data(data: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Composed plain data as `ExperimentConfig` takes it.

    Every value is there once composed, also those nobody wrote. Where a section names a config file, its
    defaults are taken out again, so that the order is: written on the command line or in a preset, file, default.
    """
    plain: dict[str, Any] = to_plain(ExperimentConfig, data)
    for name, section in plain.items():
        if isinstance(section, Mapping) and _names_a_file(section) and name in ExperimentConfig.model_fields:
            model = section_in(ExperimentConfig.model_fields[name].annotation)
            plain[name] = _leave_to_file(model, section, given, name)
    return plain


def overrides_of(experiment: ExperimentConfig) -> list[str]:
    """Overrides that compose an equal experiment: presets by the names it bears, and every value that differs."""
    composer = Composer()
    named = [f"{group}={getattr(experiment, group).name}" for group in ("model", "devices")]
    presets = [choice for choice in named if choice.partition("=")[2] in composer.choices(choice.partition("=")[0])]
    start = compose_point(composer, presets).experiment or ExperimentConfig()
    return [*presets, *_differences(start.model_dump(mode="json"), experiment.model_dump(mode="json"))]


def _differences(start: Mapping[str, Any], end: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in end.items():
        before = start.get(key)
        if isinstance(value, Mapping):
            yield from _differences(before if isinstance(before, Mapping) else {}, value, f"{path}{key}.")
        elif value != before:
            yield f"{path}{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    """A value as an override spells it, with quotes where the grammar needs them."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_quoted(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z_/][\w/.@+-]*", value):
        return show(value)
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return f"'{escaped}'"


def _names_a_file(section: Mapping[str, Any]) -> bool:
    nested = (value for value in section.values() if isinstance(value, Mapping))
    return section.get("config_file") is not None or any(map(_names_a_file, nested))


def _leave_to_file(model: type[BaseModel], section: Mapping[str, Any], given: Collection[str], path: str) -> Any:
    """A section without the defaults nobody wrote, wherever it names a config file, which may set them then."""
    kept = {}
    for name, value in section.items():
        info, key = model.model_fields.get(name), f"{path}.{name}"
        if info is not None and isinstance(value, Mapping) and (inner := section_in(info.annotation)) is not None:
            kept[name] = _leave_to_file(inner, value, given, key)
        elif (
            info is None
            or section.get("config_file") is None
            or value != info.get_default(call_default_factory=True)
            or any(item == key or item.startswith(f"{key}.") for item in given)
        ):
            kept[name] = value
    return kept


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def grid(
    overrides: Sequence[str] = (), *, config_name: str = "config", config_dir: str | Path | None = None
) -> list[GridPoint]:
    """Every combination of a sweep, checked; a point that cannot be carries its error.

    Sweeps are written as on Hydra's command line: `cache=fp8,int8`, `cache.kv_cache_page_size=range(16,129,16)`,
    `model=glob(qwen3*)`.

    Args:
        overrides: single values and sweeps.
        config_name: the root: `config`, or a verb.
        config_dir: folder with presets of your own.

    Raises:
        ConfigError: if overrides cannot be read at all, or a sweep has no values.
    """
    from kvcfg.grids import expand

    return expand(Composer(config_name, config_dir), overrides)
