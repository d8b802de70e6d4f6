"""What is said when pages run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcfg.cache.pages import SeqId
from kvcfg.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Shortage:
    """A pool that cannot cover what was asked of it.

    Attributes:
        asking: the sequences that asked.
        groups: names of the groups that share the pool.
        windowed: whether their pages fall out of sight.
        page_size: tokens in a page.
        num_pages: pages of the pool.
        free: pages without a reference, and those that the request itself would give up.
        evictable: those of the free pages that are cached.
        needed: pages asked for.
        in_all: pages that the sequences of the request would then hold.
        sequences: how many are claimed, those included.
    """

    asking: Sequence[SeqId]
    groups: Sequence[str]
    windowed: bool
    page_size: int
    num_pages: int
    free: int
    evictable: int
    needed: int
    in_all: int
    sequences: int

    def error(self, bytes_for_pages: Callable[[int], int] | None) -> CapacityError:
        """The error to raise; with `bytes_for_pages` it can offer a size for the cache."""
        count = "1 page" if self.needed == 1 else f"{self.needed} pages"
        many = len(self.asking)
        who = f"a batch of {many} sequences" if many > 1 else f"sequence {self.asking[0]!r}"
        others = self.sequences - many
        rest = "" if not others else f"; {others} other {'sequences hold' if others > 1 else 'sequence holds'} pages"
        return CapacityError(
            f"out of pages: {who} needs {count} of {self.page_size} tokens in {', '.join(self.groups)}, "
            f"{self.free} of {self.num_pages} are free, {self.evictable} of those evictable{rest}. "
            f"Try: {' or '.join(self._ways_out(bytes_for_pages))}"
        )

    def _ways_out(self, bytes_for_pages: Callable[[int], int] | None) -> list[str]:
        if self.windowed:
            return ["fewer new tokens at a time"]
        ways = []
        if bytes_for_pages is not None:
            ways.append(f"cache.kv_cache_memory_bytes={bytes_for_pages(self.num_pages + self.needed - self.free)}")
        if self.in_all <= self.num_pages and self.sequences > 1:
            ways.append(f"workload.max_batch_size={self.sequences - 1}")
        else:
            longest = max(1, self.num_pages // len(self.asking) * self.page_size)
            ways.append(f"workload.max_seq_len={longest}")
        return ways
