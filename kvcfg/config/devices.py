"""The `devices` group: what the cache lives on, how much memory there is and how fast it is read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvcfg.config.base import Config, refuse
from kvcfg.config.machine import available_memory, visible_gpus
from kvcfg.dtypes import DeviceRef
from kvcfg.errors import ConfigError, Problem
from kvcfg.units import GIB

DeviceKind = Literal["auto", "cpu", "gpu"]


class DevicesConfig(Config):
    """Equal devices, and how a model is laid out on them. `detect` fills what is null from this machine."""

    name: str = "auto"
    """What the devices are called in plans and results. `auto` becomes the name the driver reports."""

    kind: DeviceKind = "auto"
    """gpu, cpu, or auto: a GPU if this machine has one, else the CPU."""

    count: int = Field(1, ge=1)
    """Devices in all, over every replica. On a CPU: shards inside one process."""

    data_parallel_degree: int = Field(1, ge=1)
    """Replicas of the model, each with its own cache; must divide `count`. A replica is split over
    count / data_parallel_degree devices (tensor parallel)."""

    memory_gib: float | None = Field(None, gt=0)
    """Memory of one device in GiB (2**30 bytes). null = what is free on this machine now: the least free GPU
    of those used, or the available memory of the CPU divided by `count`."""

    bandwidth_gb_s: float | None = Field(None, gt=0)
    """Speed at which one device reads its memory, in GB/s (1e9 bytes). null = unknown: plans give no latency."""

    reserved_gib: float = Field(0.0, ge=0)
    """Memory of one device kept for activations, graphs and other programs, in GiB."""

    allow_kv_head_replication: bool = True
    """Whether tensor parallelism above the number of KV heads may keep copies of them."""

    @model_validator(mode="after")
    def _check_layout(self) -> DevicesConfig:
        problems: list[Problem] = []
        if self.count % self.data_parallel_degree:
            rule = f"must divide devices.count ({self.count}), so that every replica has as many devices"
            degree = _largest_divisor(self.count, self.data_parallel_degree)
            problems.append(
                Problem("data_parallel_degree", rule, self.data_parallel_degree, f"data_parallel_degree={degree}")
            )
        if self.memory_gib is not None and self.reserved_gib >= self.memory_gib:
            rule = f"must be less than the memory of one device ({self.memory_gib:g} GiB)"
            problems.append(Problem("reserved_gib", rule, self.reserved_gib, "reserved_gib=0"))
        if problems:
            refuse(*problems)
        return self

    @property
    def tensor_parallel_degree(self) -> int:
        """Devices that one replica is split over."""
        return self.count // self.data_parallel_degree

    def refs(self) -> tuple[DeviceRef, ...]:
        """One reference a device, replica by replica.

        Raises:
            ConfigError: if `kind` is still auto; `detect` decides it.
        """
        if self.kind == "auto":
            rule = "must be cpu or gpu before devices have names; detect() decides"
            raise ConfigError(Problem("kind", rule, "auto", "kind=cpu"))
        device = DeviceRef.GPU if self.kind == "gpu" else DeviceRef.CPU
        return tuple(device(index) for index in range(self.count))


def detect(devices: DevicesConfig) -> DevicesConfig:
    """The same devices with `kind` decided and memory known, read from this machine where it was left open.

    What is stated is kept. Torch is not imported, and no program is started unless a GPU driver is installed.

    Raises:
        ConfigError: if GPUs are asked for that this machine does not have, or not as many.
    """
    if devices.kind != "auto" and devices.memory_gib is not None:
        return devices
    if devices.kind == "cpu":
        return _on_cpu(devices)
    gpus = visible_gpus()
    if not gpus and devices.kind == "auto":
        return _on_cpu(devices)
    if len(gpus) < devices.count:
        rule = f"needs that many GPUs and this machine shows {len(gpus)}; state the memory of one to plan without them"
        fix = f"count={len(gpus)}" if gpus else "memory_gib=80"
        raise ConfigError(Problem("count", rule, devices.count, fix))
    used = gpus[: devices.count]
    return devices.model_copy(
        update={
            "kind": "gpu",
            "name": used[0].name if devices.name == "auto" else devices.name,
            "memory_gib": devices.memory_gib or min(gpu.free_bytes for gpu in used) / GIB,
        }
    )


def _on_cpu(devices: DevicesConfig) -> DevicesConfig:
    return devices.model_copy(
        update={
            "kind": "cpu",
            "name": "cpu" if devices.name == "auto" else devices.name,
            "memory_gib": devices.memory_gib or available_memory() / devices.count / GIB,
        }
    )


def _largest_divisor(number: int, at_most: int) -> int:
    return next(candidate for candidate in range(min(number, at_most), 0, -1) if number % candidate == 0)
