"""One config for an LLM's KV cache: what it costs, what it loses, how fast it is, and how to ship it.

    experiment = kvcfg.compose(["model=smollm2-135m", "cache.kv_cache_format=int8"])
    print(kvcfg.plan(experiment))                    # pages, bytes, tokens; needs no torch
    row = kvcfg.evaluate(experiment)                 # runs the model through the cache
    row.require(max_kl=0.01)

Importing kvcfg imports neither torch nor transformers nor hydra; each is loaded by the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcfg.config.cache import KVCacheConfig, KVConnectorConfig, KVConnectorType
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.speculative import SpeculativeConfig
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import (
    BackendUnavailable,
    CapacityError,
    ConfigError,
    GateError,
    KvcfgError,
    Problem,
    ShapeError,
)
from kvcfg.formats import FORMATS
from kvcfg.params import KVCacheParams, KVCacheQuantizationConfig, MultiKVCacheParams
from kvcfg.planning import Plan, plan
from kvcfg.sizing import (
    compute_max_seq_len_fitting_in_cache,
    compute_num_device_blocks,
    estimated_memory_size,
)
from kvcfg.version import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kvcfg.cache.building import build_manager
    from kvcfg.cache.manager import KVCacheManager
    from kvcfg.cache.paged import PagedKVCache
    from kvcfg.composition import GridPoint
    from kvcfg.evaluation.calibrating import calibrate
    from kvcfg.evaluation.measure import evaluate
    from kvcfg.evaluation.replay import replay_trace
    from kvcfg.integrations.calibration import Calibration, load_calibration
    from kvcfg.integrations.loading import load
    from kvcfg.integrations.logprobs import logprobs
    from kvcfg.integrations.prefix_cache import PrefixCache, prefix_cache
    from kvcfg.integrations.serving.engine import ServingEngine, serve
    from kvcfg.integrations.transformers import TransformersCache, build
    from kvcfg.results.row import ResultRow

__all__ = [
    "FORMATS",
    "BackendUnavailable",
    "Calibration",
    "CapacityError",
    "ConfigError",
    "DType",
    "DeviceRef",
    "ExperimentConfig",
    "GateError",
    "GridPoint",
    "KVCacheConfig",
    "KVCacheManager",
    "KVCacheParams",
    "KVCacheQuantizationConfig",
    "KVConnectorConfig",
    "KVConnectorType",
    "KvcfgError",
    "MultiKVCacheParams",
    "PagedKVCache",
    "Plan",
    "PrefixCache",
    "Problem",
    "ResultRow",
    "ServingEngine",
    "ShapeError",
    "SpeculativeConfig",
    "TransformersCache",
    "__version__",
    "build",
    "build_manager",
    "calibrate",
    "compose",
    "compute_max_seq_len_fitting_in_cache",
    "compute_num_device_blocks",
    "estimated_memory_size",
    "evaluate",
    "grid",
    "load",
    "load_calibration",
    "logprobs",
    "plan",
    "prefix_cache",
    "replay_trace",
    "serve",
    "validate",
]

_LOADED_ON_FIRST_USE = {
    "Calibration": "kvcfg.integrations.calibration",
    "GridPoint": "kvcfg.composition",
    "KVCacheManager": "kvcfg.cache.manager",
    "PagedKVCache": "kvcfg.cache.paged",
    "PrefixCache": "kvcfg.integrations.prefix_cache",
    "ResultRow": "kvcfg.results.row",
    "ServingEngine": "kvcfg.integrations.serving.engine",
    "TransformersCache": "kvcfg.integrations.transformers",
    "build": "kvcfg.integrations.transformers",
    "build_manager": "kvcfg.cache.building",
    "calibrate": "kvcfg.evaluation.calibrating",
    "evaluate": "kvcfg.evaluation.measure",
    "load": "kvcfg.integrations.loading",
    "load_calibration": "kvcfg.integrations.calibration",
    "logprobs": "kvcfg.integrations.logprobs",
    "prefix_cache": "kvcfg.integrations.prefix_cache",
    "replay_trace": "kvcfg.evaluation.replay",
    "serve": "kvcfg.integrations.serving.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_ON_FIRST_USE:
        raise AttributeError(f"module 'kvcfg' has no attribute {name!r}")
    return getattr(import_module(_LOADED_ON_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return __all__


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
    from kvcfg import composition

    return composition.compose(overrides, config_name=config_name, config_dir=config_dir)


def validate(config: DictConfig, *, prefix: str = "", overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Check a config that a Hydra application of your own composed.

    Args:
        config: the node that holds the groups.
        prefix: path of that node in the application, so that errors name keys as they are written there.
        overrides: the application's overrides; only needed with `cache.config_file`.

    Raises:
        ConfigError: with every problem.
    """
    from kvcfg import composition

    return composition.validate(config, prefix=prefix, overrides=overrides)


def grid(overrides: Sequence[str] = ()) -> list[GridPoint]:
    """Every point of a sweep (`["model=llama-3.1-8b,qwen3-8b", "cache.kv_cache_page_size=16,64"]`), checked.

    Points that cannot be carry their error instead of an experiment.

    Raises:
        ConfigError: if the overrides themselves cannot be read.
    """
    from kvcfg import composition

    return composition.grid(overrides)
