"""Configs that read a YAML file first: `config_file` names it, `section_name` a mapping inside it.

Values given beside the file win over it, key by key and through nested mappings; an explicit null wins too.
YAML is 1.1, as in Hydra: `yes` is true, `0100` is 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from kvcfg.config.base import Config, refuse
from kvcfg.errors import Problem, nearest


class ConfigFile(Config):
    """Settings that may come from a file."""

    config_file: str | None = None
    """Path of a YAML file with values for this group, relative to the working directory. null = no file."""

    section_name: str | None = Field(None, exclude=True)
    """Top-level key of config_file to read. null = the whole file. Not part of dumps."""

    def __eq__(self, other: object) -> bool:
        """Whether all values are equal, whatever section of the file they stood in."""
        if type(self) is not type(other):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), *self._values()))

    def _values(self) -> tuple[Any, ...]:
        return tuple(value for name, value in self if name != "section_name")

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("config_file") is None:
            return given
        path, section = given["config_file"], given.get("section_name")
        if not isinstance(path, str):
            refuse(Problem("config_file", "must be the path of a YAML file, as text", path))
        if section is not None and not isinstance(section, str):
            refuse(Problem("section_name", "must be a top-level key of the file, as text", section))
        return _merged(_section(path, section, known=list(cls.model_fields)), given)


def _section(path: str, name: str | None, known: list[str]) -> Mapping[Any, Any]:
    """The mapping to read from a file; refuses what is no mapping and says which sections there are."""
    root = _load(path)
    sections = [key for key, value in root.items() if isinstance(value, Mapping) and key not in known]
    if name is None:
        if sections:
            rule = f"must name one of the sections of {path}: {', '.join(map(str, sections))}"
            refuse(Problem("section_name", rule, None, f"section_name={sections[0]}"))
        values = root
    elif name not in root:
        close = nearest(name, [str(key) for key in sections])
        rule = f"{path} has " + (f"sections {', '.join(map(str, sections))}" if sections else "no sections")
        refuse(Problem("section_name", rule, name, f"section_name={close}" if close else None))
    else:
        values = root[name]
    if not isinstance(values, Mapping):
        found = "is empty" if values is None else f"is a {type(values).__name__}"
        refuse(Problem("section_name", f"must be a mapping, but in {path} it {found}", name))
    for key in ("config_file", "section_name"):
        if values.get(key) is not None:
            refuse(
                Problem("config_file", f"{path} must not name another file or section: {key} has no effect there", path)
            )
    return values


def _load(path: str) -> Mapping[Any, Any]:
    try:
        root = yaml.safe_load(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        refuse(Problem("config_file", f"cannot be read: {reason}", path))
    except yaml.YAMLError as error:
        refuse(Problem("config_file", f"is not YAML: {' '.join(str(error).split())}", path))
    if not root:
        return {}
    if not isinstance(root, Mapping):
        refuse(Problem("config_file", f"must hold a mapping at its root, not a {type(root).__name__}", path))
    return root


def _merged(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    both = {**below, **above}
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), Mapping):
            both[key] = _merged(below[key], value)
    return both
