"""Command lines and files of engines, taken apart into settings, whatever these mean."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kvcfg.errors import ConfigError, Problem

PROGRAMS = {
    ("vllm", "serve"): "vllm",
    ("sglang", "serve"): "sglang",
    ("python", "-m", "sglang.launch_server"): "sglang",
    ("python3", "-m", "sglang.launch_server"): "sglang",
    ("python", "-m", "vllm.entrypoints.openai.api_server"): "vllm",
    ("python3", "-m", "vllm.entrypoints.openai.api_server"): "vllm",
    ("max", "serve"): "max",
}
"""How command lines of engines begin."""

FILE_FLAGS = {"vllm": "config", "sglang": "config", "max": "config_file"}

SHORT = {
    "-tp": "tensor_parallel_size",
    "-dp": "data_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-sc": "speculative_config",
    "-O": "optimization_level",
}
"""Flags of one dash, and what they are short for."""


class Source(NamedTuple):
    """Settings as they were found.

    Attributes:
        engine: whose they are; None if a file does not show it.
        settings: values by the engine's name for them, with underscores; sections as they are.
    """

    engine: str | None
    settings: dict[str, Any]


def read_source(text: str) -> Source:
    """Take a command line or a file apart.

    Raises:
        ConfigError: if it is neither.
    """
    words = _words(text)
    start = _program(words)
    if start is not None:
        engine = PROGRAMS[start]
        return Source(engine, _with_file(engine, _flags(words[len(start) :])))
    path = Path(text).expanduser()
    if not path.is_file():
        starts = ", ".join(f"{' '.join(start)} …" for start in PROGRAMS if len(start) == 2)
        rule = f"is no file, nor a command line like {starts}; a command line stands in quotes"
        raise ConfigError(Problem("source", rule, text, 'kvcfg import "vllm serve MODEL --block-size 32"'))
    settings = read_yaml(path)
    return Source(_engine_of(settings), settings)


def begins_like_an_engine(text: str) -> bool:
    """Whether a text is a command line that starts an engine."""
    return _program(text.split()) is not None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file, names with underscores.

    Raises:
        ConfigError: if it cannot be read, or is no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(Problem("source", f"cannot be read: {error.strerror}", str(path))) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(Problem("source", f"is not YAML: {' '.join(str(error).split())}", str(path))) from error
    if not isinstance(data, Mapping):
        raise ConfigError(Problem("source", "must hold a mapping of settings", str(path)))
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def _program(words: Sequence[str]) -> tuple[str, ...] | None:
    """How the command line begins, if it is one of an engine."""
    return next((start for start in PROGRAMS if tuple(words[: len(start)]) == start), None)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(Problem("source", f"cannot be read as a command line: {error}", text)) from error


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """Flags and their values; `--no-x` is x=False, a flag without a value True, the first bare word the model."""
    settings: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            settings.setdefault("model", word)
            continue
        name, equals, value = word.partition("=")
        values = [value] if equals else list(_values(rest))
        name = SHORT.get(name, name.lstrip("-").replace("-", "_"))
        name, _, inner = name.partition(".")
        if name.startswith("no_") and not values:
            settings[name.removeprefix("no_")] = False
        elif inner:
            settings.setdefault(name, {})[inner] = _value(values[0]) if values else True
        else:
            settings[name] = True if not values else _value(values[0]) if len(values) == 1 else values
    return settings


def _values(rest: list[str]) -> Iterator[str]:
    while rest and not (rest[0].startswith("-") and not _is_number(rest[0])):
        yield rest.pop(0)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _value(word: str) -> Any:
    """JSON where it is an object or a number, else text."""
    try:
        value = json.loads(word)
    except ValueError:
        return word
    return value if isinstance(value, dict | int | float | bool | list) else word


def _with_file(engine: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of the file that the command line names, which lose to it."""
    path = settings.pop(FILE_FLAGS[engine], None)
    return settings if path is None else read_yaml(Path(str(path)).expanduser()) | settings


def _engine_of(settings: Mapping[str, Any]) -> str | None:
    """Whose file it is, by settings that only one of them has."""
    if isinstance(settings.get("model"), Mapping) or "kv_cache" in settings or "kv_cache_page_size" in settings:
        return "max"
    sglang = settings.keys() & {"page_size", "mem_fraction_static", "model_path", "tp_size", "disable_radix_cache"}
    vllm = settings.keys() & {"block_size", "gpu_memory_utilization", "tensor_parallel_size", "kv_cache_memory_bytes"}
    if bool(sglang) == bool(vllm):
        return None
    return "sglang" if sglang else "vllm"
