"""Hydra's side of composing: overrides to a loaded config, and what Hydra says to Problems.

Hydra stops at the first bad override. So when loading fails, overrides are added one at a time, and those that
fail are left out and told; the rest can still be checked.

Nothing global is touched: a Composer works inside another Hydra application that is running.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kvcfg.config.base import Config
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.problems import missing, refusal, unknown_key
from kvcfg.config.structured import register
from kvcfg.config.verbs import VERBS
from kvcfg.errors import ConfigError, Problem, nearest, one_of, show

CONFIG_PATH = "pkg://kvcfg.conf" if find_spec("kvcfg.conf") else str(Path(__file__).parents[2] / "conf")
"""Where the groups are: the package kvcfg.conf, or conf/ of a checkout that is not installed."""

WITHOUT_HYDRA = tuple(
    f"~hydra/{name}"
    for name in ("env", "help", "hydra_help", "hydra_logging", "job_logging", "launcher", "output", "sweeper")
)
"""Settings of Hydra itself, which an experiment does not need and which take a fifth of the time to load."""

VERSION_BASE = {"version_base": "1.3"} if hasattr(version, "base_at_least") else {}
"""For `hydra.main`: Hydra up to 1.3 wants to be told not to behave like 1.1, later ones warn when they are told."""

LOADING_ERRORS = (HydraException, OmegaConfBaseException, AssertionError, ValueError, TypeError)


@dataclass(slots=True)
class Loaded:
    """A config that Hydra could load, after the overrides that it refused were left out.

    Attributes:
        config: the composed config, without Hydra's own node.
        choices: what was chosen of every group.
        problems: what was refused, by the place of the override.
    """

    config: DictConfig
    choices: dict[str, Any]
    problems: dict[int, Problem] = field(default_factory=dict)


class Composer:
    """Loads one root config with different overrides.

    Args:
        config_name: the root: `config` or a verb.
        config_dir: folder with further presets, or None.

    Raises:
        ConfigError: if `config_dir` is no folder.
    """

    def __init__(self, config_name: str = "config", config_dir: str | Path | None = None) -> None:
        self.config_name = config_name
        self.options = VERBS.get(config_name)
        register(*[config_name] if self.options else [])
        setup_globals()
        Plugins.instance()
        search_path = ConfigSearchPathImpl()
        search_path.append("hydra", "pkg://hydra.conf")
        search_path.append("main", CONFIG_PATH if "://" in CONFIG_PATH else f"file://{CONFIG_PATH}")
        if config_dir is not None:
            search_path.append("command-line", f"file://{_existing(config_dir)}")
        search_path.append("schema", "structured://")
        self._loader = ConfigLoaderImpl(search_path)
        self._parser = OverridesParser.create(config_loader=self._loader)

    @cached_property
    def root(self) -> type[Config]:
        """A model of all keys at the root: the experiment's groups and the verb's options."""
        return ExperimentConfig if self.options is None else type("Root", (ExperimentConfig, self.options), {})

    def parse(self, overrides: Sequence[str]) -> tuple[dict[int, Override], dict[int, Problem]]:
        """Overrides by their place, and a problem for each that cannot be read; Hydra's own settings are left out."""
        parsed, problems = {}, {}
        for index, text in enumerate(overrides):
            try:
                override = self._parser.parse_overrides([text])[0]
            except HydraException as error:
                problems[index] = _unreadable(text, error)
                continue
            if not override.key_or_group:
                problems[index] = Problem(text, "is no override; write KEY=VALUE")
            elif not override.is_hydra_override():
                parsed[index] = override
        return parsed, problems

    def values(self, override: Override) -> list[str]:
        """What Hydra's basic sweeper runs for an override: one override a value, or itself if it is no sweep.

        Raises:
            ConfigError: if the sweep has no values to list, or none at all.
        """
        if not override.is_sweep_override():
            return [str(override.input_line)]
        key, text = override.get_key_element(), value_text(override)
        if not override.is_discrete_sweep():
            raise ConfigError(Problem(key, "has no values to run through; use a,b,c or range(start,stop,step)", text))
        values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        if not values:
            choices = self.choices(override.key_or_group)
            rule = f"matches none of {', '.join(choices)}" if choices else "has no values"
            raise ConfigError(Problem(key, rule, text))
        return values

    def load(self, overrides: Mapping[int, Override]) -> Loaded:
        """Load with all overrides, or with all that can be; never fails because of one."""
        lines = {index: str(override.input_line) for index, override in overrides.items()}
        try:
            return Loaded(*self._load(list(lines.values())))
        except LOADING_ERRORS:
            loaded = Loaded(*self._load([]))
        accepted: list[str] = []
        for index, line in lines.items():
            try:
                loaded.config, loaded.choices = self._load([*accepted, line])
                accepted.append(line)
            except LOADING_ERRORS as error:
                loaded.problems[index] = self._told(overrides[index], error)
        return loaded

    def apply(self, config: DictConfig, override: Override) -> Any:
        """Set one value in a config, as loading with the override would: the value as it is kept, or the problem."""
        try:
            OmegaConf.update(config, override.key_or_group, override.value())
            value = OmegaConf.select(config, override.key_or_group, throw_on_missing=True)
        except LOADING_ERRORS as error:
            return self._told(override, error)
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    def choices(self, group: str) -> list[str]:
        """The presets of a group; empty if it is none."""
        with _current_behaviour():
            return list(self._loader.get_group_options(group, ObjectType.CONFIG))

    def _load(self, lines: list[str]) -> tuple[DictConfig, dict[str, Any]]:
        with _current_behaviour():
            config = self._loader.load_configuration(
                self.config_name, [*WITHOUT_HYDRA, "hydra.job.name=kvcfg", *lines], RunMode.RUN, from_shell=False
            )
        choices = dict(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        return config, choices

    def _told(self, override: Override, error: BaseException) -> Problem:
        """Why an override was refused, in our words."""
        key, text = override.key_or_group, value_text(override)
        value = text if isinstance(override.value(), dict) else override.value()
        causes = list(_causes(error))
        if override.package is not None:
            rule = "cannot be moved: groups stay at their key"
            return Problem(f"{key}@{override.package}", rule, text, f"{key}={text}")
        if override.is_delete():
            return Problem(f"~{key}", "cannot be left out; null unsets what may be unset", fix=f"{key}=null")
        if choices := self.choices(key):
            usual = self._load([])[1].get(key)
            return Problem(key, one_of(choices), value, f"{key}={nearest(value, choices) or usual or choices[0]}")
        if any(isinstance(cause, ConfigKeyError | AttributeError) for cause in causes):
            return self._no_such_key(key, value)
        if any(isinstance(cause, OmegaConfBaseException) for cause in causes):
            return refusal(self.root, key, value)
        if isinstance(causes[-1], AssertionError):
            return Problem(key, f"cannot be set: {key.rpartition('.')[0]} is null", value)
        return Problem(key, _first_line(causes[-1]), value)

    def _no_such_key(self, key: str, value: Any) -> Problem:
        owners = [verb for verb, options in VERBS.items() if key.split(".")[0] in options.model_fields]
        if owners and self.config_name not in owners:
            return Problem(key, f"is a key of kvcfg {' and '.join(owners)} alone; leave it out here", value)
        other_groups = [name for name in self._groups() if name not in self.root.model_fields]
        if "." not in key and (close := nearest(key, other_groups)) is not None:
            return Problem(key, f"is no group; there are {', '.join(self._groups())}", value, f"{close}={show(value)}")
        return unknown_key(self.root, key, value)

    def _groups(self) -> list[str]:
        with _current_behaviour():
            return [name for name in self._loader.get_group_options("", ObjectType.GROUP) if name != "hydra"]


def plain_data(config: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """A composed config as plain data, interpolations resolved; what is missing or points nowhere is left out."""
    try:
        data, problems = OmegaConf.to_container(config, resolve=True), []
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        fix = refusal(ExperimentConfig, key, None).fix
        data, problems = OmegaConf.to_container(config), [Problem(key, _first_line(error), fix=fix)]
    assert isinstance(data, dict)
    problems += [missing(ExperimentConfig, key) for key in _missing_keys(data)]
    for problem in problems:
        _drop(data, problem.key.split("."))
    return {str(key): value for key, value in data.items()}, problems


def interpolates(config: DictConfig) -> bool:
    """Whether any value is computed from another one."""
    return "${" in str(OmegaConf.to_container(config))


def scratch_copy(config: DictConfig) -> DictConfig:
    """A copy to set values in."""
    return copy.deepcopy(config)


def value_text(override: Override) -> str:
    """What stands behind the first equals sign, as it was written."""
    return str(override.input_line).partition("=")[2]


def several_values(override: Override) -> Problem:
    """The problem of a sweep where one value belongs."""
    key, text = override.get_key_element(), value_text(override)
    rule = "is several values where one belongs; add -m to run them all, or call grid()"
    listed = "" if "(" in text else text.split(",")[0]
    return Problem(key, rule, text, f"{key}={listed}" if listed else None)


@contextmanager
def _current_behaviour() -> Iterator[None]:
    """Hydra's present behaviour rather than that of 1.1, whichever a running application has chosen."""
    base = version.VersionBase.instance()
    chosen = base.version_base
    if VERSION_BASE:
        version.setbase(VERSION_BASE["version_base"])
    try:
        yield
    finally:
        base.version_base = chosen


def _existing(folder: str | Path) -> Path:
    path = Path(folder).resolve()
    if not path.is_dir():
        raise ConfigError(Problem("--config-dir", "must be a folder with presets, and is none", str(folder)))
    return path


def _unreadable(text: str, error: HydraException) -> Problem:
    key, equals, value = text.partition("=")
    if not equals:
        return Problem(text, "is no override; write KEY=VALUE")
    rule = "cannot be read; put quotes around text with spaces or any of , : = { } [ ] ( )"
    return Problem(key, rule, value, f"{key}=\"'{value}'\"" if "'" not in value else None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _missing_keys(data: Any, path: str = "") -> Iterator[str]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if value == "???":
            yield f"{path}{key}"
        yield from _missing_keys(value, f"{path}{key}.")


def _drop(data: Any, path: list[str]) -> None:
    for part in path[:-1]:
        data = data[int(part)] if isinstance(data, list) else data.get(part, {})
    if isinstance(data, dict):
        data.pop(path[-1], None)
