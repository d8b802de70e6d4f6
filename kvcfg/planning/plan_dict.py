"""A plan as plain values, for JSON and for programs that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvcfg.planning.plans import Plan


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan. Figures at the top level are per replica, over all of its devices."""
    requested = plan.experiment.model_dump(mode="json")
    bound, lack = plan.roofline, plan.shortfall
    return {
        "fits": plan.fits,
        "bytes_per_token": plan.bytes_per_token,
        "bytes_per_page": plan.bytes_per_page,
        "num_pages": plan.num_pages,
        "num_tokens": plan.num_tokens,
        "max_sequences": plan.max_sequences,
        "max_batch_size": plan.max_batch_size,
        "max_seq_len": plan.max_seq_len,
        "kv_bytes": plan.kv_bytes,
        "breakdown": plan.breakdown() | {"of_these": plan.included()},
        "per_device": per_device(plan),
        "total": total(plan),
        "layer_groups": plan.layer_groups(),
        "roofline": asdict(bound) | {"min_step_ms": bound.min_step_ms, "max_tokens_per_s": bound.max_tokens_per_s},
        "shortfall": None if lack is None else asdict(lack) | {"missing": lack.missing},
        "choices": [asdict(choice) for choice in plan.choices],
        "notices": list(plan.notices),
        "requested": requested,
        "resolved": resolved(plan, requested),
    }


def per_device(plan: Plan) -> dict[str, int]:
    """Bytes of one device: `memory` is the sum of the others."""
    return {
        "memory": plan.budget.memory,
        "held_back": plan.budget.held_back,
        "weights": plan.budget.weights,
        "reserved": plan.budget.reserved,
        "kv": plan.kv_bytes_per_device,
        "free": plan.free_bytes_per_device,
    }


def total(plan: Plan) -> dict[str, int]:
    """The same over all devices, and what all replicas hold together."""
    devices = plan.resolution.devices
    replicas = devices.data_parallel_degree
    return {
        "devices": devices.count,
        "replicas": replicas,
        **{key: size * devices.count for key, size in per_device(plan).items()},
        "num_pages": plan.num_pages * replicas,
        "num_tokens": plan.num_tokens * replicas,
        "max_sequences": plan.max_sequences * replicas,
        "kv_bytes": plan.kv_bytes * replicas,
    }


def resolved(plan: Plan, requested: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked with every choice put in, in the same shape."""
    values = {group: dict(settings) for group, settings in requested.items()}
    values["devices"] = plan.resolution.devices.model_dump(mode="json")
    for choice in plan.choices:
        group, _, key = choice.key.partition(".")
        if group != "devices" and key in values.get(group, {}):
            values[group][key] = choice.resolved
    return values
