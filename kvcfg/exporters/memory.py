"""What `device_memory_utilization` means to an engine: bytes are planned first, and everything is made from those.

The same 0.9 is a share of free memory with the weights in it (MAX), of total memory with activations in it (vLLM), of
free memory for weights and cache (SGLang), or of what weights leave free (TensorRT-LLM).
"""

from __future__ import annotations

from math import ceil

from kvcfg.planning.plans import Plan
from kvcfg.units import readable_bytes

_DIGITS = 4


def budget_key(plan: Plan) -> str:
    """The key that says how much memory the cache may take."""
    explicit = plan.experiment.cache.kv_cache_memory_bytes is not None
    return "cache.kv_cache_memory_bytes" if explicit else "cache.device_memory_utilization"


def planned_bytes(plan: Plan) -> int:
    """Bytes of one device that the cache is given: those that were stated, else what the plan uses of its share."""
    if plan.experiment.cache.kv_cache_memory_bytes is not None:
        return plan.budget.available
    return min(plan.kv_bytes_per_device, plan.budget.available)


def how_planned(plan: Plan) -> str:
    """The arithmetic that leads to `planned_bytes`, in words."""
    budget, given = plan.budget, planned_bytes(plan)
    if budget.explicit is not None:
        room = f", lowered to what {readable_bytes(budget.memory)} leave" if budget.explicit > budget.room else ""
        return f"{readable_bytes(given)} a device, as stated{room}"
    share = plan.experiment.cache.device_memory_utilization
    terms = [f"{share:g} × {readable_bytes(budget.memory)}", f"{readable_bytes(budget.weights)} of weights"]
    if budget.reserved:
        terms.append(f"{readable_bytes(budget.reserved)} reserved")
    words = f"{' − '.join(terms)} = {readable_bytes(budget.available)} a device"
    used = f"; the workload uses {readable_bytes(given)} of it"
    return words + (used if plan.experiment.workload.max_batch_size is not None else "")


def share_of_memory(plan: Plan) -> float:
    """The share that was asked for where the cache uses all of it, else `share_used`."""
    explicit, limited = plan.budget.explicit is not None, plan.experiment.workload.max_batch_size is not None
    if explicit or limited or plan.budget.reserved:
        return share_used(plan)
    return plan.experiment.cache.device_memory_utilization


def share_used(plan: Plan) -> float:
    """The share of a device's memory that weights and the planned pages take together, rounded up to four digits."""
    taken = plan.budget.weights + min(plan.kv_bytes_per_device, plan.budget.available)
    return float(min(1.0, ceil(taken / plan.budget.memory * 10**_DIGITS) / 10**_DIGITS))
