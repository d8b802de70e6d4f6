"""Settings as the files and command lines that engines read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kvcfg.errors import ConfigError, Problem

FLAGGED = ("vllm", "sglang")
"""Engines whose files hold nothing but the long names of their flags."""


def document(settings: Mapping[str, Any], name: str) -> str:
    """The text of a file: YAML, or NAME=value lines where the file is an environment."""
    if name.endswith(".env"):
        return "".join(f"{key}={value}\n" for key, value in settings.items())
    text: str = yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=1000)
    return text


def command_flags(engine: str, launch: tuple[str, ...], settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The launch command with every setting as a flag; None for engines that take most of them from files alone."""
    if engine not in FLAGGED:
        return None
    rest = {key: value for key, value in settings.items() if key != "model"}
    model = [str(settings["model"])] if "model" in settings else []
    return (*launch, *model, *(word for key, value in rest.items() for word in _flag(engine, key, value)))


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all; folders are made, an older file is replaced.

    Raises:
        ConfigError: if it cannot be written there.
    """
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            scratch = file.name
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise ConfigError(Problem("out", f"cannot be written: {error.strerror}", str(path))) from error


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, sections below each other."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _flag(engine: str, key: str, value: Any) -> Iterator[str]:
    if value is True:
        yield f"--{key}"
    elif value is False:
        if engine == "vllm":
            yield f"--no-{key}"
    elif isinstance(value, Mapping):
        yield from (f"--{key}", json.dumps(value))
    elif isinstance(value, list):
        yield from (f"--{key}", *map(str, value))
    else:
        yield from (f"--{key}", str(value))
