"""What would make a workload fit; or, if it fits, how much more would.

Every answer is a set of overrides to add to the command line, and every one was planned before it is told.
Single changes come first. Where none of them leaves workload and devices alone, the cheapest combination
follows: all combinations are tried in the order of their cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from kvcfg.config.devices import DevicesConfig
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.presets import device_presets
from kvcfg.planning.capacity import longest_context
from kvcfg.planning.changes import (
    UNCHANGED,
    Change,
    fewer_devices,
    fewer_replicas,
    larger_budgets,
    more_devices,
    other_devices,
    smaller_formats,
    smaller_pages,
    smaller_weights,
    total_gib,
    wider_formats,
)
from kvcfg.planning.plans import Plan, plan
from kvcfg.planning.shortfall import corrections, rounded_context

MOST_PRESETS = 3


@dataclass(frozen=True, slots=True)
class Option:
    """A change and the plan that it leads to."""

    change: Change
    plan: Plan

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to add to the command line."""
        return self.change.overrides

    def to_dict(self) -> dict[str, Any]:
        """The change and what it gives, as plain values."""
        return {
            "overrides": list(self.overrides),
            "what": self.change.what,
            "max_sequences": self.plan.max_sequences,
            "max_seq_len": self.plan.max_seq_len,
            "num_tokens": self.plan.num_tokens,
            "kv_bytes": self.plan.kv_bytes,
            "free_per_device": self.plan.free_bytes_per_device,
        }


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer of `fit`.

    Attributes:
        plan: the experiment as it was asked.
        options: if it does not fit, single changes that each mend it; if it does, how far each setting can go.
        combination: changes that mend it together, where no single one leaves workload and devices alone.
    """

    plan: Plan
    options: tuple[Option, ...]
    combination: Option | None

    @property
    def fits(self) -> bool:
        """Whether the experiment fits as it was asked."""
        return self.plan.fits

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values that JSON can hold."""
        return {
            "fits": self.fits,
            "options": [option.to_dict() for option in self.options],
            "combination": None if self.combination is None else self.combination.to_dict(),
            "plan": self.plan.to_dict(),
        }

    def table(self) -> str:
        """The answer as text for people, at most 100 columns wide."""
        from kvcfg.planning.fit_text import fit_text

        return fit_text(self)

    def __str__(self) -> str:
        return self.table()


def fit(experiment: ExperimentConfig, *, presets: Mapping[str, DevicesConfig] | None = None) -> Fit:
    """What would make the workload of an experiment fit, or how much more would.

    Args:
        experiment: what was asked.
        presets: devices that could be had, by the name that `devices=` takes. None = those of `conf/devices`.

    Raises:
        ConfigError: if the experiment itself cannot be resolved.
    """
    asked = plan(experiment)
    known = device_presets() if presets is None else presets
    if asked.fits:
        return Fit(asked, tuple(_headroom(asked, known)), None)
    options = tuple(_remedies(asked, known))
    is_enough = any(option.change.keeps_devices and option.change.keeps_workload for option in options)
    return Fit(asked, options, None if is_enough else _combination(asked, known))


def _remedies(asked: Plan, presets: Mapping[str, DevicesConfig]) -> Iterator[Option]:
    """Single changes that make it fit: first those that keep the workload, then less work, then devices."""
    experiment, devices = asked.experiment, asked.resolution.devices
    yield from _fitting(experiment, _cache_changes(experiment))
    yield from _fitting(experiment, smaller_weights(experiment))
    yield from _fitting(experiment, _corrections(asked))
    yield from islice(_fitting(experiment, fewer_replicas(experiment)), 1)
    yield from islice(_fitting(experiment, more_devices(experiment, devices)), 1)
    yield from islice(_fitting(experiment, other_devices(devices, presets)), MOST_PRESETS)


def _headroom(asked: Plan, presets: Mapping[str, DevicesConfig]) -> Iterator[Option]:
    """How far each setting can go alone: a longer context, more sequences, a format that loses less, less memory."""
    experiment, devices = asked.experiment, asked.resolution.devices
    yield from _fitting(experiment, _more_work(asked))
    yield from _fitting(experiment, wider_formats(experiment))
    yield from islice(_fitting(experiment, fewer_devices(experiment)), 1)
    smaller = (item for item in other_devices(devices, presets) if item.devices and _is_smaller(item.devices, devices))
    yield from islice(_fitting(experiment, smaller), 1)


def _cache_changes(experiment: ExperimentConfig) -> Iterator[Change]:
    yield from smaller_formats(experiment)
    yield from smaller_pages(experiment)


def _corrections(asked: Plan) -> Iterator[Change]:
    words = {
        "workload.max_seq_len": "shorter sequences",
        "workload.max_batch_size": "fewer sequences",
        "cache.kv_cache_memory_bytes": "a larger budget",
        "cache.device_memory_utilization": "more of the memory",
    }
    for key, value in corrections(asked.budget, asked.capacity).items():
        yield Change({key: value}, words[key], 1.0)


def _more_work(asked: Plan) -> Iterator[Change]:
    capacity, context = asked.capacity, asked.experiment.model.max_seq_len
    batch = capacity.requested_batch_size or 1
    longest = longest_context(capacity.params, capacity.budget, batch, context)
    if longest > asked.max_seq_len:
        yield Change({"workload.max_seq_len": longest}, "the longest sequences", 1.0)
    if asked.max_sequences > asked.max_batch_size:
        yield Change({"workload.max_batch_size": asked.max_sequences}, "the most sequences", 1.0)


def _is_smaller(one: DevicesConfig, other: DevicesConfig) -> bool:
    return total_gib(one) < total_gib(other)


def _fitting(experiment: ExperimentConfig, changes: Iterable[Change]) -> Iterator[Option]:
    """The changes after which the workload fits, with their plans."""
    for change in changes:
        changed = change.planned(experiment)
        if changed is not None and changed.fits:
            yield Option(change, changed)


def _combination(asked: Plan, presets: Mapping[str, DevicesConfig]) -> Option | None:
    """The cheapest changes that together make the workload fit: on the same devices, else on any.

    Where no devices that are known hold the workload, sequences are shortened as little as it takes.
    """
    experiment, devices = asked.experiment, asked.resolution.devices
    axes = [
        [UNCHANGED, *smaller_formats(experiment)],
        [UNCHANGED, *smaller_weights(experiment)],
        [UNCHANGED, *larger_budgets(experiment)],
    ]
    here = _by_cost(axes)
    elsewhere = [*fewer_replicas(experiment), *more_devices(experiment, devices), *other_devices(devices, presets)]
    anywhere = _by_cost([*axes, elsewhere])
    together = next((option for option in _fitting(experiment, here) if len(option.change.values) > 1), None)
    if together is not None:
        return together
    together = next(_fitting(experiment, anywhere), None)
    return together or _shortened(experiment, [*here, *anywhere])


def _by_cost(axes: list[list[Change]]) -> list[Change]:
    """One choice from each axis, all combinations, the cheapest first."""
    return sorted((sum(parts, UNCHANGED) for parts in product(*axes)), key=lambda change: change.cost)


def _shortened(experiment: ExperimentConfig, changes: Iterable[Change]) -> Option | None:
    """The change after which sequences have to be shortened least; of those, the cheapest."""
    best: tuple[int, Change] = (0, UNCHANGED)
    for change in changes:
        changed = change.planned(experiment)
        context = 0 if changed is None else rounded_context(changed.capacity)
        if context > best[0]:
            best = (context, change)
    shorter = best[1] + Change({"workload.max_seq_len": best[0]}, "shorter sequences", 1.0)
    return next(_fitting(experiment, [shorter]), None) if best[0] else None
