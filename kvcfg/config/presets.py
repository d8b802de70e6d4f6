"""Presets of `conf/`, read without Hydra: devices that could be had, recipes that were measured."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from kvcfg.config.devices import DevicesConfig


@cache
def device_presets() -> dict[str, DevicesConfig]:
    """Every preset of `conf/devices` by its name."""
    return {name: DevicesConfig.model_validate(values) for name, values in preset_values("devices").items()}


def preset_values(group: str) -> dict[str, dict[str, Any]]:
    """What each preset of a group sets, by its name, as `GROUP=NAME` composes it: presets may build on siblings."""
    return {file.stem: _values(file) for file in sorted((_conf_folder() / group).glob("*.yaml"))}


def _values(file: Path) -> dict[str, Any]:
    written = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    siblings = [name for name in written.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    values: dict[str, Any] = {}
    for name in siblings:
        values |= _values(file.with_name(f"{name}.yaml"))
    return values | written


def _conf_folder() -> Path:
    """The package kvcfg.conf, or conf/ of a checkout that is not installed."""
    found = find_spec("kvcfg.conf")
    if found is not None and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0])
    return Path(__file__).parents[2] / "conf"
