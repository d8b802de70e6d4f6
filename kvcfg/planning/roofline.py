"""The least time a decode step can take: every byte it must read, over the speed of the memory.

Each sequence makes one token a step (with drafts, at best one and all of its drafts), and a device reads

    weights   its share of those that one token passes through, once for the whole batch
    keys and values   of every token seen: all of the context, the window, or the running chunk; those of a
                      drafter once for each of its own steps
    states    of linear layers: read and written

Nothing else is counted: not computing, not traffic between devices, not experts that only other
sequences of the batch wake, not the second read of layers that share a cache. So a real step takes
longer; it can only be shorter where the data stay in caches on the chip, or sequences share a prefix
that is read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcfg.params import KVCacheParams, MultiKVCacheParams
from kvcfg.units import ceil_div


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes that one device moves in one decode step, and the bound that follows from them.

    Attributes:
        batch_size: sequences of one replica.
        seq_len: tokens that each of them has.
        tokens_per_step: tokens that one sequence gains in a step, at best.
        replicas: data parallel degree.
        weight_bytes: weights read per device and step.
        kv_bytes: keys, values, scales and states read or written per device and step.
        bytes_per_second: speed of the memory of one device; None if unknown, and then so are the bounds.
    """

    batch_size: int
    seq_len: int
    tokens_per_step: int
    replicas: int
    weight_bytes: int
    kv_bytes: int
    bytes_per_second: float | None

    @property
    def min_step_ms(self) -> float | None:
        """Lower bound of the time of a step, in milliseconds."""
        if self.bytes_per_second is None:
            return None
        return (self.weight_bytes + self.kv_bytes) / self.bytes_per_second * 1e3

    @property
    def max_tokens_per_s(self) -> float | None:
        """Upper bound of the tokens made per second, by all sequences of all replicas together."""
        step_ms = self.min_step_ms
        if not step_ms:
            return None
        return self.replicas * self.batch_size * self.tokens_per_step / step_ms * 1e3


def roofline(
    params: MultiKVCacheParams,
    active_weight_bytes: int,
    bandwidth_gb_s: float | None,
    batch_size: int,
    seq_len: int,
) -> Roofline:
    """The bound for a batch of sequences that are all `seq_len` tokens long."""
    first = params.params[0]
    return Roofline(
        batch_size=batch_size,
        seq_len=seq_len,
        tokens_per_step=1 + (first.num_draft_tokens if first.speculative_method else 0),
        replicas=first.data_parallel_degree,
        weight_bytes=ceil_div(active_weight_bytes, first.tensor_parallel_degree),
        kv_bytes=batch_size * sum(_reads(group) * bytes_touched(group, seq_len) for group in params.params),
        bytes_per_second=None if bandwidth_gb_s is None else bandwidth_gb_s * 1e9,
    )


def _reads(group: KVCacheParams) -> int:
    """How often a step reads the keys and values of a group: a drafter does for every draft that it makes alone."""
    if group.role == "target":
        return 1
    return ceil_div(group.num_draft_tokens, max(1, group.num_draft_tokens_per_step))


def bytes_touched(group: KVCacheParams, seq_len: int) -> int:
    """Bytes of one sequence that one device reads or writes in a step, over the layers of a group."""
    if group.kind == "linear":
        return 2 * group.state_bytes * group.num_layers // group.tensor_parallel_degree
    return _tokens_seen(group, seq_len) * group.bytes_per_layer_page * group.num_layers // group.page_size


def _tokens_seen(group: KVCacheParams, seq_len: int) -> int:
    """Tokens that the newest of `seq_len` tokens looks at, itself included."""
    if group.window is None:
        return seq_len
    return (seq_len - 1) % group.window + 1 if group.kind == "chunked" else min(seq_len, group.window)
