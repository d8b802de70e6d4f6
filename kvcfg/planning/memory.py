"""What the memory of one device is spent on before the cache gets its share.

    memory − held back − weights − reserved = available for the cache, per device

Weights are split over the devices of a replica (TP) and repeated by each replica (DP). An explicit
`cache.kv_cache_memory_bytes` is a ceiling per device, like the fraction it replaces; it is lowered, and
said to be, where the device does not hold that much beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcfg.units import GIB, ceil_div

if TYPE_CHECKING:
    from kvcfg.config.devices import DevicesConfig
    from kvcfg.config.experiment import ExperimentConfig


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """Bytes of one device, before any page is counted.

    Attributes:
        memory: all that the device has (for devices of this machine: all that is free).
        usable: the part that kvcfg may plan with.
        weights: the model's share of this device.
        reserved: kept for activations, graphs and the like.
        explicit: `cache.kv_cache_memory_bytes`, or None where the fraction decides.
    """

    memory: int
    usable: int
    weights: int
    reserved: int
    explicit: int | None

    @property
    def room(self) -> int:
        """What is left beside weights and reserve; negative if they do not fit."""
        return self.usable - self.weights - self.reserved

    @property
    def available(self) -> int:
        """What the cache may take; negative if not even the weights fit."""
        return self.room if self.explicit is None else min(self.explicit, self.room)

    @property
    def held_back(self) -> int:
        """What neither weights nor reserve nor cache may take: beyond the fraction or the explicit budget."""
        return self.memory - self.weights - self.reserved - self.available


def device_budget(experiment: ExperimentConfig, devices: DevicesConfig) -> DeviceBudget:
    """The budget of each device; an explicit budget may use the whole device, the fraction does not apply.

    Args:
        experiment: what was asked for.
        devices: the same devices with nothing left open, as `experiment.resolve()` gives them.
    """
    cache = experiment.cache
    assert devices.memory_gib is not None, "detect() fills it"
    memory = int(devices.memory_gib * GIB)
    explicit = cache.kv_cache_memory_bytes
    return DeviceBudget(
        memory=memory,
        usable=memory if explicit is not None else int(memory * cache.device_memory_utilization),
        weights=ceil_div(experiment.model.weight_bytes, devices.tensor_parallel_degree),
        reserved=int(devices.reserved_gib * GIB),
        explicit=explicit,
    )
