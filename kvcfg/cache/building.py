"""From an experiment to the engine that was planned for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from kvcfg.cache.manager import KVCacheManager
from kvcfg.cache.namespace import namespace
from kvcfg.cache.prefix import PageHasher
from kvcfg.cache.replica import CacheOptions, Calibration
from kvcfg.config.cache import KVConnectorType
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import is_measured, needs_calibration, stored_layers
from kvcfg.dtypes import DeviceRef
from kvcfg.errors import BackendUnavailable, CapacityError, ConfigError, Problem, ShapeError
from kvcfg.planning import plan


def build_manager(
    experiment: ExperimentConfig,
    *,
    devices: Sequence[torch.device] | None = None,
    adapter: str | None = None,
    calibrated: Calibration | None = None,
    overcommit: bool = False,
) -> KVCacheManager:
    """Allocate the planned cache of all replicas, with the prefix caching and eviction that the config asks for.

    Args:
        experiment: what to build; `kvcfg plan` shows the bytes.
        devices: one device per shard, replica after replica; None = those of the config.
        adapter: name or digest of the adapter that the model runs with; its pages are kept apart.
        calibrated: for recipes that need it, what `kvcfg.integrations.calibrated_layers.calibrated_groups` reads.
        overcommit: build it with as many pages as there is memory for even if not all sequences can have their full
            length at the same time: for callers that take pages away from some of them.

    Raises:
        ConfigError: if the recipe is none that was measured, and `quantization.experimental` is false.
        BackendUnavailable: if the config names a GPU that this machine does not have, or tiers.
        CapacityError: if the plan does not fit in memory.
        ShapeError: if the recipe needs a calibration and got none.
    """
    planned = plan(experiment)
    if not planned.fits and not (overcommit and planned.num_pages):
        raise CapacityError(str(planned.shortfall))
    check_connector(experiment)
    check_recipe(experiment)
    if calibrated is None and any(needs_calibration(group.storage) for group in planned.resolution.params.params):
        what = "this recipe reads what kvcfg calibrate wrote"
        raise ShapeError(f"{what}: give calibrated=calibrated_groups(experiment, model)")
    params = planned.resolution.params
    return KVCacheManager(
        params,
        num_pages=planned.num_pages,
        max_batch_size=planned.max_batch_size,
        max_seq_len=planned.max_seq_len,
        devices=[_torch_device(device) for device in params.devices] if devices is None else devices,
        options=cache_options(experiment, adapter=adapter, calibrated=calibrated),
        calibrated=calibrated,
    )


def cache_options(
    experiment: ExperimentConfig, *, adapter: str | None = None, calibrated: Calibration | None = None
) -> CacheOptions:
    """What the `cache` group says of prefix caching and eviction; pages are named for this experiment alone."""
    params, cache = experiment.to_params(), experiment.cache
    hasher = PageHasher(
        cache.kv_cache_hash_algo,
        seed=bytes.fromhex(cache.kv_cache_hash_seed or ""),
        namespace=namespace(experiment, adapter=adapter, calibration=_digest(calibrated)),
    )
    return CacheOptions(
        enable_prefix_caching=params.enable_prefix_caching,
        hasher=hasher,
        eviction=cache.eviction,
        verify_prefix_tokens=cache.verify_prefix_tokens,
        reuse_partial_pages=cache.reuse_partial_pages,
        enable_dp_cross_replica_prefix_copy=cache.enable_dp_cross_replica_prefix_copy,
    )


def check_recipe(experiment: ExperimentConfig) -> None:
    """Raise ConfigError if a layer's recipe is none that was measured, and nobody said that this is known."""
    if experiment.quantization.experimental:
        return
    for layers in stored_layers(experiment):
        if layers.group.elements_per_token and layers.group.window is None and not is_measured(layers.recipe):
            what = f"what no file of conf/quantization stands for ({layers.recipe})"
            rule = f"must be true to run {what}; it can be planned as it is"
            raise ConfigError(Problem("quantization.experimental", rule, False, "quantization.experimental=true"))


def check_connector(experiment: ExperimentConfig) -> None:
    """Raise BackendUnavailable if pages are to leave the device: tiers can be planned and replayed, not yet built."""
    connector = experiment.cache.kv_connector
    if connector not in (None, KVConnectorType.null):
        raise BackendUnavailable(
            f"cache.kv_connector={connector} can be planned and replayed, but pages cannot leave the device yet. "
            "Try: cache.kv_connector=null"
        )


def _digest(calibrated: Calibration | None) -> str | None:
    if calibrated is None:
        return None
    digest = hashlib.sha256()
    for group in calibrated:
        for layer in group or ():
            for side in layer:
                for part in (side.matrices, side.amax):
                    digest.update(b"none" if part is None else part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _torch_device(device: DeviceRef) -> torch.device:
    if device.is_cpu():
        return torch.device("cpu")
    if device.id >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"{device} is not on this machine, which has {torch.cuda.device_count()} GPUs. Try: devices=cpu"
        )
    return torch.device("cuda", device.id)
