"""Overrides to checked experiments: one at a time, a grid of them, and back to overrides.

    overrides ──Composer──► composed data ──check──► ExperimentConfig
         │ cannot be read         │ missing            │ range, name, rule
         │ no such key or choice  │                    │
         └────────────────────────┴────────────────────┴──► Problems, one ConfigError

Nothing global is touched: all of it works inside another Hydra application that is running.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvcfg.composition.composer import Composer, plain_data
from kvcfg.composition.grids import expand
from kvcfg.composition.points import GridPoint, check_point, compose_point, key_of
from kvcfg.composition.spelling import overrides_of
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["GridPoint", "compose", "grid", "overrides_of", "validate"]


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
    given = [key_of(override).removeprefix(f"{prefix}.") for override in overrides]
    point = check_point((), data, problems, given=given)
    if point.experiment is None:
        raise (point.error or ConfigError(())).under(prefix)
    return point.experiment


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
    return expand(Composer(config_name, config_dir), overrides)
