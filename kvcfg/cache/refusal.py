"""What is said when pages run out, or a sequence cannot do what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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


def unclaimed(seq_id: SeqId) -> ValueError:
    """A sequence that the ledger does not know."""
    return ValueError(f"sequence {seq_id!r} is not claimed")


def in_use(seq_id: SeqId) -> ValueError:
    """A name that another sequence has."""
    return ValueError(f"sequence {seq_id!r} is claimed already; release it first")


def pin_in_use(name: Hashable) -> ValueError:
    """A name that other pinned pages have."""
    return ValueError(f"pin {name!r} is in use; unpin it first")


def not_pinned(name: Hashable) -> ValueError:
    """A name under which nothing is pinned."""
    return ValueError(f"nothing is pinned as {name!r}")


def without_ids(seq_id: SeqId) -> ValueError:
    """Ids for a sequence whose ids are never known."""
    return ValueError(f"sequence {seq_id!r} was claimed without token ids")


def check_counts(num_tokens: int, num_drafts: int) -> None:
    """Refuse numbers of tokens below 0."""
    if num_tokens < 0 or num_drafts < 0:
        raise ValueError(f"numbers of tokens must be at least 0, got {num_tokens} and {num_drafts}")


def check_commit(seq_id: SeqId, length: int, capacity: int, num_ids: int | None) -> None:
    """Refuse to count tokens as stored that have no slots, or no ids where ids are known."""
    cannot = f"cannot commit sequence {seq_id!r} up to {length} tokens"
    if length > capacity:
        raise ValueError(f"{cannot}: it has slots for {capacity}; alloc them first")
    if num_ids is not None and length > num_ids:
        raise ValueError(f"{cannot}: ids of {num_ids} are known; extend it first")


def check_cut(seq_id: SeqId, stored: int, closed: int, page_size: int, length: int) -> None:
    """Refuse to take back tokens that are not there, or part of a closed page."""
    cannot = f"cannot cut sequence {seq_id!r} of {stored} tokens to {length}"
    if not 0 <= length <= stored:
        raise ValueError(f"{cannot}: must be between 0 and {stored}")
    if length % page_size and length < closed * page_size:
        raise ValueError(
            f"{cannot}: a page that is closed is not opened again; commit with num_drafts, the tokens that may be "
            f"taken back, or cut to {length // page_size * page_size}"
        )
