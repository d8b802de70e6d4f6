"""What the ledger asks of the engine behind it; the ledger keeps others out while a method runs.

There are two, and they do the same. `LedgerSteps` can do everything. `CompiledSteps` is for the plain case:
groups that grow, the lru policy, names that its kernel can chain.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from kvcfg.cache.metrics import LedgerMetrics
from kvcfg.cache.pages import Allocation, Commit, Forecast, PageCopy, PageRun, PageTable, SeqId

Held = list[list[int]]
"""Pages of each pool."""


class LedgerEngine(Protocol):
    """Sequences, pools and prefix cache of one replica. What a method does is said at `PageLedger`."""

    def __len__(self) -> int: ...

    def __contains__(self, seq_id: object) -> bool: ...

    def claim(
        self,
        seq_id: SeqId,
        tokens: Iterable[int] | None,
        salt: bytes,
        names: Sequence[Hashable] | None,
        priority: int,
    ) -> None: ...

    def extend(self, seq_id: SeqId, ids: array[int]) -> None: ...

    def alloc(self, seq_id: SeqId, num_new_tokens: int, lookahead: int) -> Allocation: ...

    def alloc_batch(
        self, seq_ids: Sequence[SeqId], num_new_tokens: int, ids: array[int] | None, lookahead: int
    ) -> tuple[PageRun, ...]: ...

    def commit(self, seq_ids: Sequence[SeqId], num_tokens: int, num_drafts: int | None) -> Commit: ...

    def count_copied(self, num_tokens: int) -> None:
        """Count tokens as cached that were counted as input."""

    def truncate(self, seq_id: SeqId, length: int) -> None: ...

    def fork(self, parent: SeqId, child: SeqId) -> tuple[PageCopy, ...]: ...

    def release(self, seq_id: SeqId, head_first: bool) -> None: ...

    def forecast(self, seq_id: SeqId, num_new_tokens: int, lookahead: int) -> Forecast: ...

    def length(self, seq_id: SeqId) -> int: ...

    def room(self, seq_id: SeqId) -> int: ...

    def table(self, seq_id: SeqId, group: int) -> PageTable: ...

    def page_names(self, seq_id: SeqId, num_new_tokens: int) -> tuple[Hashable, ...]: ...

    def num_closed(self, seq_id: SeqId) -> int: ...

    def closed_pages(self, seq_id: SeqId) -> Held: ...

    def find(self, page_names: Sequence[Hashable]) -> Held:
        """Pages of the longest run of names; none where windows would need pages of their own."""

    def num_cached(self, page_names: Sequence[Hashable]) -> int: ...

    def hold(self, held: Held) -> None: ...

    def drop(self, held: Held) -> None:
        """Let go of pages, the last ones first."""

    def forget_unused(self) -> int: ...

    def metrics(self) -> LedgerMetrics: ...

    def reset_metrics(self) -> None: ...

    def check_integrity(self, pins: Iterable[Held]) -> None: ...
