"""The engines that a config can be exported to, by version, and the export itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError, Problem
from kvcfg.exporters.exported import Export
from kvcfg.exporters.memory import planned_bytes
from kvcfg.planning.plans import Plan, plan
from kvcfg.registry import Registry, load_object

ENGINES = Registry(
    "engine",
    {
        "vllm": "kvcfg.exporters.vllm:export_vllm",
        "sglang": "kvcfg.exporters.sglang:export_sglang",
        "trtllm": "kvcfg.exporters.trtllm:export_trtllm",
        "max": "kvcfg.exporters.max:export_max",
        "lmcache": "kvcfg.exporters.lmcache:export_lmcache",
        "llamacpp": "kvcfg.exporters.llamacpp:export_llamacpp",
    },
)
"""Names of engines and the functions that export to them; the module of each lists the versions it knows."""

Exporter = Callable[[Plan, str], Export]


class EngineVersion(NamedTuple):
    """One engine in one version: what an exporter's rules are for."""

    engine: str
    version: str


def versions(engine: str) -> tuple[str, ...]:
    """The versions of an engine that there is an export for, oldest first."""
    known: tuple[str, ...] = load_object(f"{ENGINES[engine].partition(':')[0]}:VERSIONS")
    return known


def find_version(engine: str, version: str | None) -> EngineVersion:
    """The engine and version whose rules to follow; `26.7` also stands for `26.7.1`, and None for the newest.

    Raises:
        ConfigError: if there is no such engine, or no export for that version; it names the nearest.
    """
    known = versions(engine)
    if version is None:
        return EngineVersion(engine, known[-1])
    for name in known:
        if version == name or version.startswith(f"{name}."):
            return EngineVersion(engine, name)
    nearest = min(known, key=lambda name: _apart(name, version))
    rule = f"{engine} is known in {', '.join(known)}"
    raise ConfigError(Problem("version", rule, version, f"version={nearest}"))


def export(experiment: ExperimentConfig, engine: str, version: str | None = None) -> Export:
    """One config as one engine takes it; torch is not needed, and nothing is written.

    Args:
        experiment: the config.
        engine: one of `ENGINES`.
        version: its version; None for the newest that is known.

    Raises:
        ConfigError: if there is no such engine or version, or the engine cannot store the cache so; each problem
            names the nearest that works.
    """
    found = find_version(engine, version)
    exporter: Exporter = ENGINES.load(engine)
    planned = plan(experiment)
    if planned_bytes(planned) <= 0:
        lack = planned.shortfall
        why = f"has no room for a cache{'' if lack is None else f': {lack.why}'}"
        fix = lack.overrides[0] if lack is not None and lack.overrides else "kvcfg fit, which says what makes room"
        raise ConfigError(Problem("devices", why, planned.resolution.devices.name, fix))
    return exporter(planned, found.version)


def export_all(experiment: ExperimentConfig) -> dict[EngineVersion, Export | ConfigError]:
    """One config as every engine in every known version takes it, or why one cannot."""
    made: dict[EngineVersion, Export | ConfigError] = {}
    for engine in ENGINES:
        for version in versions(engine):
            try:
                made[EngineVersion(engine, version)] = export(experiment, engine, version)
            except ConfigError as error:
                made[EngineVersion(engine, version)] = error
    return made


def as_dicts(made: Mapping[EngineVersion, Export | ConfigError]) -> list[dict[str, Any]]:
    """All exports as plain values; one that cannot be has an error instead of settings."""
    return [
        {**key._asdict(), "error": str(item)} if isinstance(item, ConfigError) else item.to_dict()
        for key, item in made.items()
    ]


def _apart(one: str, other: str) -> list[int]:
    """How far two versions are apart, part by part."""
    first, second = (_numbers(text) for text in (one, other))
    size = max(len(first), len(second))
    padded = [[*numbers, *[0] * (size - len(numbers))] for numbers in (first, second)]
    return [abs(mine - its) for mine, its in zip(*padded, strict=True)]


def _numbers(version: str) -> list[int]:
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")]
