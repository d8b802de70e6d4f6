"""One combination of overrides: composed, checked, and kept with its error if it cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from kvcfg.composition.composer import Composer, plain_data, several_values
from kvcfg.config.base import Config
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.fields import section_in
from kvcfg.config.problems import check, check_options
from kvcfg.config.structured import to_plain
from kvcfg.config.verbs import VERBS
from kvcfg.errors import ConfigError, Problem

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


def read_point(config: DictConfig, verb: str, overrides: Sequence[str]) -> GridPoint:
    """Check what the Hydra application of a verb composed from overrides."""
    data, problems = plain_data(config)
    return check_point(overrides, data, problems, VERBS[verb], given=[key_of(item) for item in overrides])


def key_of(override: str) -> str:
    """What an override sets, without the marks for adding and deleting."""
    return override.partition("=")[0].lstrip("+~")


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
