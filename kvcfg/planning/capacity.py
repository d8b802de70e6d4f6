"""How many pages and sequences a budget holds: `params.memory`, solved backwards, in whole numbers.

The formula is affine in the number of pages, and in the number of sequences where each of them is
given all the pages of its full length. So two values of it give its slope, and a division solves it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from kvcfg.params import Memory, MultiKVCacheParams


@dataclass(frozen=True)
class Capacity:
    """The pool that a budget gives a workload; all of it for one replica, over all of its devices.

    Attributes:
        params: the layer groups.
        budget: bytes that the cache may take.
        requested_batch_size: sequences that the workload holds at a time; None for as many as fit.
        max_seq_len: longest sequence, in tokens.
    """

    params: MultiKVCacheParams
    budget: int
    requested_batch_size: int | None
    max_seq_len: int

    @cached_property
    def pages_per_sequence(self) -> int:
        """Pages of the growing groups that one sequence of full length takes; 0 if nothing grows."""
        growing = (group for group in self.params.params if group.grows)
        return max((group.pages_per_sequence(self.max_seq_len) for group in growing), default=0)

    @cached_property
    def max_sequences(self) -> int:
        """Sequences of full length that the budget holds, whether or not so many were asked for."""
        one, two = self.memory_of(1).total, self.memory_of(2).total
        return max(0, 1 + (self.budget - one) // (two - one))

    @cached_property
    def max_batch_size(self) -> int:
        """Sequences that the pool is laid out for: those asked for, else those that fit, and at least one."""
        return self.requested_batch_size or max(1, self.max_sequences)

    @cached_property
    def needed(self) -> Memory:
        """What the workload takes where memory is no limit."""
        return self.memory_of(self.max_batch_size)

    @property
    def fits(self) -> bool:
        """Whether every sequence of the workload can have its full length at the same time."""
        return self.needed.total <= self.budget

    @cached_property
    def num_pages(self) -> int:
        """Pages of the pool, the null page not counted: what the budget holds and the workload can use."""
        if not self.params.grows:
            return 0
        without = self.params.memory(0, self.max_batch_size, self.max_seq_len).total
        most = max(0, (self.budget - without) // self.params.bytes_per_block)
        if self.requested_batch_size is None:
            return most
        return min(most, self.requested_batch_size * self.pages_per_sequence)

    @cached_property
    def planned(self) -> Memory:
        """What the pool takes: the figure that an allocation equals to the byte."""
        return self.params.memory(self.num_pages, self.max_batch_size, self.max_seq_len)

    def memory_of(self, num_sequences: int) -> Memory:
        """What that many sequences of full length take."""
        return self.params.memory(num_sequences * self.pages_per_sequence, num_sequences, self.max_seq_len)


def longest_context(params: MultiKVCacheParams, budget: int, num_sequences: int, limit: int) -> int:
    """Tokens, up to `limit`, that each of `num_sequences` can have at the same time; 0 if not even one."""

    def needed(max_seq_len: int) -> int:
        return Capacity(params, budget, num_sequences, max_seq_len).needed.total

    return bisect_right(range(1, limit + 1), budget, key=needed)
