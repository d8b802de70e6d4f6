"""What the ledger keeps of one sequence: how far it is stored, its pages, and what they will be called."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from kvcfg.cache.index import PageIds
from kvcfg.cache.pages import SeqId
from kvcfg.cache.prefix import PageHasher


@dataclass(slots=True)
class SequencePages:
    """Pages of one sequence in one pool: page `first + n` of the sequence is `pages[n]`."""

    first: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Index of the page after the last one."""
        return self.first + len(self.pages)


@dataclass(slots=True, eq=False)
class SequenceState:
    """One claimed sequence.

    Attributes:
        seq_id: its name.
        page_size: tokens in a page.
        pages: per pool, its pages.
        ids: token ids known so far; None if they never will be.
        names: names of its full pages, as far as they were needed or given.
        root: what names are chained from; None if the names were given, or there are none.
        priority: for the eviction policy.
        length: tokens stored.
        final: tokens that cannot be taken back.
        closed: pages closed, all of them before `final`.
        counted: tokens counted as input or as cached.
        capacity: tokens that its pages have slots for.
    """

    seq_id: SeqId
    page_size: int
    pages: list[SequencePages]
    ids: array[int] | None = None
    names: list[Hashable] = field(default_factory=list)
    root: bytes | None = None
    priority: int = 0
    length: int = 0
    final: int = 0
    closed: int = 0
    counted: int = 0
    capacity: int = 0

    def named(self, num_pages: int, hasher: PageHasher) -> Sequence[Hashable]:
        """Names of the first pages: `num_pages` of them, or as many as can be known now."""
        names = self.names
        if len(names) < num_pages and self.root is not None and self.ids is not None:
            end = min(num_pages, len(self.ids) // self.page_size)
            if end > len(names):
                parent = names[-1] if names else self.root
                assert isinstance(parent, bytes)
                names += hasher.chain(parent, self.ids, self.page_size, len(names), end)
        return names if len(names) <= num_pages else names[:num_pages]

    def parent(self, page: int) -> Hashable:
        """The name before the one of a page; the names up to there are known."""
        return self.names[page - 1] if page else self.root

    def page_ids(self) -> PageIds | None:
        """Where the token ids of a page are read from, if they are known."""
        ids, size = self.ids, self.page_size
        return None if ids is None else lambda page: ids[page * size : (page + 1) * size].tobytes()

    def measure(self) -> None:
        """Set the capacity to what every pool has pages for."""
        ends = [item.first + len(item.pages) for item in self.pages]
        self.capacity = (min(ends) if ends else _UNLIMITED) * self.page_size

    def cut(self, length: int) -> None:
        """Forget tokens from `length` on, after the pages that held them are gone."""
        self.length, self.final = length, min(self.final, length)
        self.closed = min(self.closed, length // self.page_size)
        if self.ids is not None:
            del self.ids[length:]
        if self.root is not None:
            del self.names[length // self.page_size :]
        self.measure()

    def copy(self, seq_id: SeqId, pages: list[SequencePages]) -> SequenceState:
        """A sequence with another name and pages, alike in all else."""
        ids = None if self.ids is None else self.ids[:]
        child = replace(self, seq_id=seq_id, pages=pages, ids=ids, names=self.names[:])
        child.measure()
        return child

    def check_integrity(self) -> None:
        """Compare the counts with each other.

        Raises:
            AssertionError: if they disagree.
        """
        where = f"sequence {self.seq_id!r}"
        assert 0 <= self.final <= self.length <= self.capacity, f"{where}: {self.final}, {self.length}, {self.capacity}"
        assert self.closed == self.final // self.page_size, (
            f"{where}: {self.closed} pages closed, {self.final} tokens final"
        )
        assert self.capacity == min((item.end for item in self.pages), default=_UNLIMITED) * self.page_size, where
        assert self.ids is None or self.length <= len(self.ids), f"{where}: tokens stored whose ids are not known"


_UNLIMITED = 2**62
"""Pages of a sequence whose groups store none."""
