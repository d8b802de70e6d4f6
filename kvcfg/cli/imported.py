"""`kvcfg import`: print an engine's settings as a config, and write it as a preset if that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kvcfg.cli.arguments import Arguments
from kvcfg.cli.json_output import print_json
from kvcfg.composition.points import GridPoint
from kvcfg.config.verbs import ImportOptions
from kvcfg.errors import ConfigError, Problem
from kvcfg.exporters.documents import write_whole
from kvcfg.importers import Imported, read_config


def import_source(arguments: Arguments, points: Sequence[GridPoint]) -> int:
    """Read the command line or file of each point."""
    made = [_read(point) for point in points]
    for point, item in zip(points, made, strict=True):
        if point.options.out is not None:
            write_whole(Path(point.options.out).expanduser(), preset_text(item))
    if points[0].options.output == "json":
        rows = [item.to_dict() for item in made]
        print_json(arguments, rows)
    else:
        print("\n\n".join(item.table() for item in made))
    return 0


def preset_text(made: Imported) -> str:
    """The config as a preset of the group `experiment`: what is chosen of groups, then single values."""
    groups = [item.partition("=")[::2] for item in made.overrides if "." not in item.partition("=")[0]]
    values: dict[str, Any] = {}
    dumped = made.experiment.model_dump(mode="json")
    for item in made.overrides:
        *path, name = item.partition("=")[0].split(".")
        if not path:
            continue
        section, value = values, dumped
        for part in path:
            section, value = section.setdefault(part, {}), value[part]
        section[name] = value[name]
    head = f"# @package _global_\n# Imported from {made.engine} {made.version}."
    chosen = [{f"override /{group}": choice} for group, choice in groups]
    body = {"defaults": chosen, **values} if chosen else values
    return f"{head}\n{yaml.safe_dump(body, sort_keys=False, default_flow_style=False)}"


def _read(point: GridPoint) -> Imported:
    options: ImportOptions = point.options
    if options.source is None:
        raise ConfigError(Problem("source", "must be a command line or a file", None, "source='vllm serve MODEL'"))
    return read_config(options.source, options.engine, options.version, options.beside)
