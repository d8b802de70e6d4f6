"""States of linear layers: a fixed number of bytes for each sequence, overwritten as it grows.

    arena    uint8 [num_layers, max_batch_size, this shard's part of state_bytes]

What a state holds is its layer's business; the cache keeps it, copies it on a fork, and cannot take it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcfg.params import KVCacheParams


class StateStorage:
    """The states of one layer group on the shards of one replica.

    Args:
        params: a linear group.
        max_batch_size: sequences held at the same time.
        devices: one device per tensor parallel shard.
    """

    def __init__(self, params: KVCacheParams, max_batch_size: int, devices: Sequence[torch.device]) -> None:
        total, shards = params.state_bytes, len(devices)
        ends = [total * rank // shards for rank in range(shards + 1)]
        self.arenas = [
            torch.zeros((params.num_layers, max_batch_size, stop - start), dtype=torch.uint8, device=device)
            for device, start, stop in zip(devices, ends[:-1], ends[1:], strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes on all shards."""
        return sum(arena.nbytes for arena in self.arenas)

    def state(self, layer: int, row: int) -> tuple[Tensor, ...]:
        """One sequence's state in one layer: per shard its bytes, to be read and overwritten in place."""
        return tuple(arena[layer, row] for arena in self.arenas)

    def clear(self, row: int) -> None:
        """Zero the state of a row."""
        for arena in self.arenas:
            arena[:, row] = 0

    def copy(self, source: int, target: int) -> None:
        """Copy the state of one row to another."""
        for arena in self.arenas:
            arena[:, target] = arena[:, source]
