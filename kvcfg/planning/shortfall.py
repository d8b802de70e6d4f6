"""What is missing where a workload does not fit, and the smallest corrections that need nothing new.

Only corrections that are solved directly are offered here: a shorter context, fewer sequences, a larger
share of the memory that is there. `fit` also looks at other formats, devices and combinations.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from kvcfg.planning.capacity import Capacity, longest_context
from kvcfg.planning.memory import DeviceBudget
from kvcfg.units import MIB, ceil_div, readable_bytes

HIGHEST_UTILIZATION = 0.98
"""The largest share of a device that is worth proposing: drivers and allocators want some as well."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Bytes that one device lacks.

    Attributes:
        needs: what the cache of the whole workload takes, per device.
        has: what is left for it, per device; negative if not even the weights fit.
        why: what takes too much, as a sentence.
        overrides: single corrections that make it fit, each to be pasted as it is; maybe none.
    """

    needs: int
    has: int
    why: str
    overrides: tuple[str, ...]

    @property
    def missing(self) -> int:
        """Bytes to be found, per device."""
        return self.needs - self.has

    def __str__(self) -> str:
        mend = " or ".join(self.overrides) or "`kvcfg fit` for what would"
        return f"does not fit: {self.why}; {readable_bytes(self.missing)} missing. Try: {mend}"


def shortfall(budget: DeviceBudget, capacity: Capacity) -> Shortfall | None:
    """What is missing, or None if the workload fits."""
    if capacity.fits:
        return None
    needs = ceil_div(capacity.needed.total, capacity.params.tensor_parallel_degree)
    return Shortfall(
        needs=needs,
        has=budget.available,
        why=_why(budget, capacity, needs),
        overrides=tuple(f"{key}={value}" for key, value in corrections(budget, capacity).items()),
    )


def corrections(budget: DeviceBudget, capacity: Capacity) -> dict[str, int | float | str]:
    """Values that each make the workload fit when set alone; empty where none does."""
    found: dict[str, int | float | str] = {}
    context = rounded_context(capacity)
    if context:
        found["workload.max_seq_len"] = context
    if (capacity.requested_batch_size or 0) > capacity.max_sequences >= 1:
        found["workload.max_batch_size"] = capacity.max_sequences
    needs = ceil_div(capacity.needed.total, capacity.params.tensor_parallel_degree)
    if budget.explicit is not None and budget.explicit < needs <= budget.room:
        found["cache.kv_cache_memory_bytes"] = _whole_mib(needs, budget.room)
    if budget.explicit is None:
        utilization = ceil((needs + budget.weights + budget.reserved) / budget.memory * 1000) / 1000
        if utilization <= HIGHEST_UTILIZATION:
            found["cache.device_memory_utilization"] = utilization
    return found


def rounded_context(capacity: Capacity) -> int:
    """The longest context that fits, in whole pages where it has a page at all; 0 where nothing fits."""
    page_size = capacity.params.page_size
    longest = longest_context(capacity.params, capacity.budget, capacity.max_batch_size, capacity.max_seq_len)
    return longest if longest < page_size else longest // page_size * page_size


def _whole_mib(size: int, limit: int) -> int | str:
    """A size rounded up to MiB, as it would be typed; to the byte where rounding goes over the limit."""
    rounded = ceil_div(size, MIB)
    return f"{rounded}MiB" if rounded * MIB <= limit else size


def _why(budget: DeviceBudget, capacity: Capacity, needs: int) -> str:
    batch, length = capacity.max_batch_size, capacity.max_seq_len
    what = f"{batch:,} sequence{'s' if batch > 1 else ''} of {length:,} tokens"
    if budget.explicit is not None and budget.explicit <= budget.room:
        verb = "take" if batch > 1 else "takes"
        return (
            f"{what} {verb} {readable_bytes(needs)} of a device; the cache may take {readable_bytes(budget.explicit)}"
        )
    reserved = f", the reserve {readable_bytes(budget.reserved)}" if budget.reserved else ""
    return (
        f"weights take {readable_bytes(budget.weights)} of a device{reserved} and {what} {readable_bytes(needs)}; "
        f"{readable_bytes(budget.usable)} may be used"
    )
