"""Single settings that could be changed so that a workload fits, and how an experiment looks once they are.

Values go by the keys of the command line, so that what was planned is what a person pastes. A change of
the whole `devices` group is written with the name of a preset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log2
from typing import Any

from kvcfg.config.devices import DevicesConfig
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import show
from kvcfg.formats import FORMATS
from kvcfg.planning.plans import Plan, plan

WEIGHT_BITS = {8: "8-bit weights", 4.5: "4-bit weights"}
"""Bits of a stored parameter, its share of scales included, that checkpoints are commonly found with."""

SHARDS = (2, 4, 8, 16, 32)
SMALL_PAGES = (64, 32, 16)
HIGH_UTILIZATION = 0.95


@dataclass(frozen=True, slots=True)
class Change:
    """Settings to change together.

    Attributes:
        values: keys of the command line and what they become; `devices` names a preset.
        what: the change in words.
        cost: how much it asks of a person, to compare changes: about 1 for a setting, more where weights
            must be found in another form or devices bought.
        devices: the preset that `devices` names.
    """

    values: Mapping[str, Any]
    what: str
    cost: float
    devices: DevicesConfig | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """The change as words of the command line."""
        return tuple(f"{key}={_written(value)}" for key, value in self.values.items())

    @property
    def keeps_devices(self) -> bool:
        """Whether the same devices do."""
        return not any(key.partition(".")[0] == "devices" for key in self.values)

    @property
    def keeps_workload(self) -> bool:
        """Whether as many sequences stay as long."""
        return not any(key.partition(".")[0] == "workload" for key in self.values)

    def __add__(self, other: Change) -> Change:
        return Change(
            {**self.values, **other.values},
            ", ".join(filter(None, (self.what, other.what))),
            self.cost + other.cost,
            other.devices or self.devices,
        )

    def planned(self, experiment: ExperimentConfig) -> Plan | None:
        """The plan of the changed experiment, or None if it cannot be."""
        try:
            return plan(self.applied(experiment))
        except ValueError:  # ConfigError is one, and so is what pydantic raises
            return None

    def applied(self, experiment: ExperimentConfig) -> ExperimentConfig:
        """The changed experiment, validated as a whole.

        Raises:
            ValueError: if the values cannot be or do not go together.
        """
        groups = {name: getattr(experiment, name) for name in ExperimentConfig.model_fields}
        for key, value in self.values.items():
            name, _, field = key.partition(".")
            if not field:
                groups[name] = self.devices
                continue
            known = {item: getattr(groups[name], item) for item in type(groups[name]).model_fields}
            # A file that was read is in the values already; reading it again would bring the old ones back.
            kept = {item: old for item, old in known.items() if item not in ("config_file", "section_name")}
            groups[name] = type(groups[name]).model_validate(kept | {field: value})
        return ExperimentConfig.model_validate(groups)


UNCHANGED = Change({}, "", 0.0)


def smaller_formats(experiment: ExperimentConfig) -> Iterator[Change]:
    """Formats of fewer bits, keys and values alike, with their default scales."""
    yield from (change for bits, change in _formats(experiment) if bits < stored_bits(experiment))


def wider_formats(experiment: ExperimentConfig) -> Iterator[Change]:
    """Formats of more bits, which lose less; none wider than what the model computes in."""
    least, most = stored_bits(experiment), FORMATS[experiment.model.dtype].bits
    yield from (change for bits, change in _formats(experiment) if least < bits <= most)


def stored_bits(experiment: ExperimentConfig) -> int:
    """Bits of one stored element: the wider of keys and values."""
    stored = [group.storage for group in experiment.to_params().params]
    return max(max(recipe.key_format.bits, recipe.value_format.bits) for recipe in stored)


def _formats(experiment: ExperimentConfig) -> Iterator[tuple[int, Change]]:
    asked = experiment.quantization
    fields = type(asked).model_fields.items()
    reset = {f"quantization.{key}": field.default for key, field in fields if getattr(asked, key) != field.default}
    # Below 8 bits what is lost depends on the whole recipe, so that a format alone is no advice.
    for name, item in ((name, item) for name, item in FORMATS.items() if not item.is_packed):
        yield item.bits, Change({"cache.kv_cache_format": name, **reset}, f"{item.bits}-bit cache", 1.0)


def smaller_weights(experiment: ExperimentConfig) -> Iterator[Change]:
    """The same model from a checkpoint of fewer bits, which has to be found or made."""
    model = experiment.model
    for cost, (bits, what) in enumerate(WEIGHT_BITS.items(), start=2):
        if bits * model.n_params < model.weight_bytes * 8:
            yield Change({"model.weight_bits": bits}, what, cost)


def smaller_pages(experiment: ExperimentConfig) -> Iterator[Change]:
    """Pages that leave less room unused at the end of a sequence and of a window."""
    for size in SMALL_PAGES:
        if size < experiment.cache.kv_cache_page_size:
            yield Change({"cache.kv_cache_page_size": size}, f"pages of {size} tokens", 0.5)


def larger_budgets(experiment: ExperimentConfig) -> Iterator[Change]:
    """More of the memory that is there."""
    cache = experiment.cache
    if cache.kv_cache_memory_bytes is not None:
        yield Change({"cache.kv_cache_memory_bytes": None}, "all that the share leaves", 0.5)
    elif cache.device_memory_utilization < HIGH_UTILIZATION:
        what = f"{HIGH_UTILIZATION:.0%} of the memory"
        yield Change({"cache.device_memory_utilization": HIGH_UTILIZATION}, what, 0.5)


def fewer_replicas(experiment: ExperimentConfig) -> Iterator[Change]:
    """The same devices in fewer replicas, each over more of them."""
    count, replicas = experiment.devices.count, experiment.devices.data_parallel_degree
    for fewer in range(replicas - 1, 0, -1):
        if count % fewer == 0:
            shards = count // fewer
            values = {"devices.data_parallel_degree": fewer, **_replicated(experiment, shards)}
            yield Change(values, f"replicas of {shards} devices", 2 * log2(replicas / fewer))


def more_devices(experiment: ExperimentConfig, devices: DevicesConfig) -> Iterator[Change]:
    """More devices of the same kind for every replica.

    Args:
        experiment: what was asked.
        devices: its devices with nothing left open.
    """
    shards = [shards for shards in SHARDS if shards > devices.tensor_parallel_degree and devices.kind == "gpu"]
    for more in shards:
        count = more * devices.data_parallel_degree
        values = {"devices.count": count, **_replicated(experiment, more)}
        yield Change(values, f"{count} × {devices.name}", 4 * log2(count / devices.count))


def _replicated(experiment: ExperimentConfig, shards: int) -> dict[str, bool]:
    """What lets that many shards keep copies of heads, where there are fewer heads than shards."""
    groups = experiment.model.layer_groups
    heads = [group.n_kv_heads for group in groups if group.kind not in ("mla", "linear", "shared")]
    needed = min(heads, default=shards) < shards and not experiment.devices.allow_kv_head_replication
    return {"devices.allow_kv_head_replication": True} if needed else {}


def fewer_devices(experiment: ExperimentConfig) -> Iterator[Change]:
    """Fewer of the same devices for every replica, the fewest first."""
    devices = experiment.devices
    for shards in range(1, devices.tensor_parallel_degree):
        count = shards * devices.data_parallel_degree
        yield Change({"devices.count": count}, f"{count} × {devices.name}", 1.0)


def other_devices(devices: DevicesConfig, presets: Mapping[str, DevicesConfig]) -> Iterator[Change]:
    """Presets of as many replicas, the smallest memory first."""
    own = _own_settings(devices, presets)
    known = {name: item for name, item in presets.items() if item.kind == "gpu" and total_gib(item)}
    for name, preset in sorted(known.items(), key=lambda item: (total_gib(item[1]), item[1].count)):
        if preset.data_parallel_degree == devices.data_parallel_degree and preset != devices:
            cost = 4 + max(0.0, 4 * log2(total_gib(preset) / total_gib(devices)))
            values = {"devices": name, **{f"devices.{field}": getattr(preset, field) for field in own}}
            yield Change(values, f"{preset.count} × {preset.memory_gib:g} GiB", cost, preset)


def _own_settings(devices: DevicesConfig, presets: Mapping[str, DevicesConfig]) -> list[str]:
    """Fields that were set beside the preset of that name, and would stay when another preset is chosen."""
    fields = [field for field in DevicesConfig.model_fields if field != "name"]
    same = [preset for preset in presets.values() if preset.name == devices.name]
    differing = [[item for item in fields if getattr(devices, item) != getattr(preset, item)] for preset in same]
    return min(differing, key=len, default=[])


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else show(value)


def total_gib(devices: DevicesConfig) -> float:
    """Memory over all devices, in GiB; 0 if it is not stated."""
    return devices.count * (devices.memory_gib or 0.0)
