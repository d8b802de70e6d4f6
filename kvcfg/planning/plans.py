"""A plan: what one experiment's cache costs and holds, item by item, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kvcfg.config.drafts import draft_layers
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import stored_layers
from kvcfg.config.resolution import Choice, Resolution
from kvcfg.params import KVCacheParams
from kvcfg.planning.capacity import Capacity
from kvcfg.planning.memory import DeviceBudget, device_budget
from kvcfg.planning.roofline import Roofline, roofline
from kvcfg.planning.shortfall import Shortfall, shortfall
from kvcfg.units import ceil_div, readable_bytes


def plan(experiment: ExperimentConfig) -> Plan:
    """What the cache of an experiment costs and holds; nothing is allocated and torch is not needed.

    A workload that does not fit gives a plan too: `fits` is False and `shortfall` says what is missing.

    Raises:
        ConfigError: if the experiment cannot be resolved, for instance GPUs of unknown memory on a machine
            without them.
    """
    resolution = experiment.resolve()
    budget = device_budget(experiment, resolution.devices)
    capacity = Capacity(
        params=resolution.params,
        budget=budget.available * resolution.devices.tensor_parallel_degree,
        requested_batch_size=experiment.workload.max_batch_size,
        max_seq_len=resolution.max_seq_len,
    )
    return Plan(experiment, resolution, budget, capacity)


@dataclass(frozen=True)
class Plan:
    """The cache of one experiment, counted. Figures are per replica, over all devices of it, unless they say otherwise.

    Attributes:
        experiment: what was asked.
        resolution: what it became: parameters per layer group, devices, reasons.
        budget: the memory of one device before any page.
        capacity: pages and sequences that the budget holds.
    """

    experiment: ExperimentConfig
    resolution: Resolution
    budget: DeviceBudget
    capacity: Capacity

    @property
    def fits(self) -> bool:
        """Whether all sequences of the workload can have their full length at the same time."""
        return self.capacity.fits

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token of one sequence takes, in the layers that grow with the context."""
        return self.resolution.params.bytes_per_token

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page, in the layers that grow with the context."""
        return self.resolution.params.bytes_per_block

    @property
    def num_pages(self) -> int:
        """Pages that can be handed out; the null page is not counted. 0 if no layer grows with the context."""
        return self.capacity.num_pages

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds; of a model whose layers all forget, those of full sequences."""
        if not self.resolution.params.grows:
            return min(self.max_sequences, self.max_batch_size) * self.max_seq_len
        return self.num_pages * self.resolution.params.page_size

    @property
    def max_seq_len(self) -> int:
        """Longest sequence of the workload, in tokens."""
        return self.capacity.max_seq_len

    @property
    def max_batch_size(self) -> int:
        """Sequences that the pool is laid out for."""
        return self.capacity.max_batch_size

    @property
    def max_sequences(self) -> int:
        """Sequences of `max_seq_len` tokens that the memory holds, even if the workload has fewer."""
        return self.capacity.max_sequences

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole cache, tables included: `params.memory(...).total`, and what allocating it takes."""
        return self.capacity.planned.total

    @property
    def kv_bytes_per_device(self) -> int:
        """Bytes of the cache on one device; all devices of a replica hold as much."""
        return ceil_div(self.kv_bytes, self.resolution.params.tensor_parallel_degree)

    @property
    def free_bytes_per_device(self) -> int:
        """What the cache may take of one device and does not; negative where it does not fit."""
        return self.budget.available - self.kv_bytes_per_device

    @cached_property
    def shortfall(self) -> Shortfall | None:
        """What is missing, or None if the workload fits."""
        return shortfall(self.budget, self.capacity)

    @cached_property
    def roofline(self) -> Roofline:
        """The bound on decoding, all sequences of the workload at full length."""
        devices = self.resolution.devices
        return roofline(
            self.resolution.params,
            self.experiment.model.active_weight_bytes,
            devices.bandwidth_gb_s,
            self.max_batch_size,
            self.max_seq_len,
        )

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Everything that was left open or came out otherwise, with the reason."""
        own = []
        if self.capacity.requested_batch_size is None:
            why = f"as many of {self.max_seq_len:,} tokens as fit" if self.fits else "not even one fits"
            own.append(Choice("workload.max_batch_size", None, self.max_batch_size, why))
        explicit, room = self.budget.explicit, max(0, self.budget.room)
        if explicit is not None and explicit > room:
            why = f"a device has {readable_bytes(room)} beside weights and reserve"
            own.append(Choice("cache.kv_cache_memory_bytes", explicit, room, why))
        return (*self.resolution.choices, *own)

    @property
    def notices(self) -> tuple[str, ...]:
        """What may be meant so but should be known."""
        cache = self.experiment.cache
        if self.resolution.params.enable_prefix_caching and cache.kv_cache_hash_algo == "xxh3_128":
            return (
                "cache.kv_cache_hash_algo=xxh3_128 is fast, but someone who tries can make two prompts share a page; "
                "where tenants share the cache use sha256.",
            )
        return ()

    def breakdown(self) -> dict[str, int]:
        """Bytes of the cache by what they are for; they add up to `kv_bytes`."""
        memory = self.capacity.planned
        return {
            "pages": memory.pages,
            "draft_pages": memory.draft_pages,
            "open_pages": memory.open_pages,
            "windowed_pages": memory.windowed,
            "linear_states": memory.states,
            "null_pages": memory.null_pages,
            "page_tables": memory.page_tables,
        }

    def included(self) -> dict[str, int]:
        """Bytes that pages of the breakdown hold beside plain keys and values."""
        pools = [(group, self.pages_of(group)) for group in self.resolution.params.params]
        return {
            "scales": sum((pages + 1) * _scale_bytes(group) for group, pages in pools if pages),
            "draft_slack": self.max_batch_size * sum(self._slack_bytes(group) for group, pages in pools if pages),
        }

    def pages_of(self, group: KVCacheParams) -> int:
        """Pages that the pool of a layer group has, its null page not counted."""
        if group.grows:
            return self.num_pages
        return self.max_batch_size * group.pages_per_sequence(self.max_seq_len)

    def _slack_bytes(self, group: KVCacheParams) -> int:
        plain = replace(group, num_draft_tokens=0)
        extra = group.pages_per_sequence(self.max_seq_len) - plain.pages_per_sequence(self.max_seq_len)
        return extra * group.bytes_per_block

    def layer_groups(self) -> list[dict[str, Any]]:
        """One entry a layer group of the model, those that store nothing included, then those of its drafter."""
        stored = iter(self.resolution.params.params)
        own = [layers.group for layers in stored_layers(self.experiment)]
        entries = []
        for place, group in enumerate((*own, *draft_layers(self.experiment).groups)):
            params = None if group.kind == "shared" else next(stored)
            entries.append(
                {
                    "role": "target" if place < len(own) else "draft",
                    "kind": group.kind,
                    "num_layers": group.num_layers,
                    "n_kv_heads": group.n_kv_heads,
                    "head_dim": group.head_dim,
                    "value_head_dim": group.value_dim,
                    "window": group.window,
                    "format": params.storage.format_name if params and params.stores_pages else None,
                    "n_kv_heads_per_device": params.n_kv_heads_per_device if params else 0,
                    "num_pages": self.pages_of(params) if params else 0,
                    "pages_per_sequence": params.pages_per_sequence(self.max_seq_len) if params else 0,
                    "bytes_per_block": params.bytes_per_block if params else 0,
                    "bytes_per_token": params.bytes_per_token if params else 0,
                    "bytes_per_sequence": params.bytes_per_sequence(self.max_seq_len) if params else 0,
                }
            )
        return entries

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values that JSON can hold: bytes and pages are integers, times milliseconds."""
        from kvcfg.planning.plan_dict import plan_dict

        return plan_dict(self)

    def table(self) -> str:
        """The plan as text for people, at most 100 columns wide."""
        from kvcfg.planning.plan_text import plan_text

        return plan_text(self)

    def __str__(self) -> str:
        return self.table()


def _scale_bytes(group: KVCacheParams) -> int:
    """Bytes of the scales of one page over all layers and shards."""
    shape = (group.page_size, group.n_kv_heads_per_device, group.head_dim, group.value_dim)
    layers_and_shards = group.num_layers * group.tensor_parallel_degree
    return group.storage.scale_bytes(*shape) * layers_and_shards
