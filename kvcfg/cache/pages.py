"""The values that the page ledger takes and returns."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvcfg.errors import ConfigError, Problem, one_of

SeqId = Hashable
GroupKind = Literal["full", "mla", "sliding_window", "chunked", "linear", "shared"]

GROWING = ("full", "mla")
WINDOWED = ("sliding_window", "chunked")
PAGELESS = ("linear", "shared")


@dataclass(frozen=True, slots=True)
class PageGroup:
    """What the ledger must know of one layer group.

    Attributes:
        name: for messages.
        kind: full and mla grow; sliding_window and chunked keep what their window sees; linear and shared
            have no pages.
        window: tokens that a query of a windowed group sees, itself included; else None.
        num_pages: pages of a windowed group's own pool, null page not counted; else None: growing groups
            share the ledger's.

    Raises:
        ConfigError: if the kind is unknown, or a windowed group lacks its window or pages.
    """

    name: str
    kind: GroupKind = "full"
    window: int | None = None
    num_pages: int | None = None

    def __post_init__(self) -> None:
        kinds = (*GROWING, *WINDOWED, *PAGELESS)
        if self.kind not in kinds:
            raise ConfigError(Problem(f"{self.name}.kind", one_of(kinds), self.kind))
        if self.kind in WINDOWED:
            for field, value in (("window", self.window), ("num_pages", self.num_pages)):
                if value is None or value < 1:
                    raise ConfigError(Problem(f"{self.name}.{field}", f"must be at least 1 for {self.kind}", value))


class PageTable(NamedTuple):
    """Pages of one sequence in one group.

    Attributes:
        first: index in the sequence of the first page in `pages`; its tokens start at `first * page_size`.
        pages: page ids. They cover the sequence from there on and the slots allocated beyond its length. The
            null page (the group's number of pages) stands where a windowed group stores nothing.
    """

    first: int
    pages: tuple[int, ...]

    def page(self, place: int) -> int:
        """A page, by its index in the sequence."""
        return self.pages[place - self.first]


class PageRun(NamedTuple):
    """Neighbouring entries of one page table.

    Attributes:
        seq_id: whose table.
        group: index of the group in `PageLedger.groups`; groups that share a pool each have a run of their own.
        first: index in the sequence of the first page in `pages`, counted from its first token.
        pages: page ids.
    """

    seq_id: SeqId
    group: int
    first: int
    pages: tuple[int, ...]


class PageCopy(NamedTuple):
    """Bytes that the caller must copy: all layers of one group, page `source` to page `target`."""

    group: int
    source: int
    target: int


class Allocation(NamedTuple):
    """What `alloc` did.

    Attributes:
        cached_tokens: tokens found in the prefix cache by this call; the sequence's length grew by them.
        length: tokens of the sequence that are stored now; the next one to compute has this position.
        new_pages: runs of the page tables that are new or changed, hits included; what the others hold is
            undefined.
        copies: what the caller must copy before anything is written; those tokens count as cached.
    """

    cached_tokens: int
    length: int
    new_pages: tuple[PageRun, ...]
    copies: tuple[PageCopy, ...] = ()


class Commit(NamedTuple):
    """What `commit` did.

    Attributes:
        closed: pages that will never be written again.
        moved: page-table runs that changed because the same content was cached already; read from there.
        dropped: runs that left a windowed group's table; no query will see them again.
    """

    closed: tuple[PageRun, ...] = ()
    moved: tuple[PageRun, ...] = ()
    dropped: tuple[PageRun, ...] = ()


class Forecast(NamedTuple):
    """What an `alloc` would do now, exactly.

    Attributes:
        cached_tokens: tokens it would find in the prefix cache.
        pages: free pages it would use up, over all pools: new ones, and hits that nobody holds.
        fits: whether it would succeed.
    """

    cached_tokens: int
    pages: int
    fits: bool
