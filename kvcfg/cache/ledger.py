"""Who holds which page: every decision of the cache engine that needs no tensor.

    claim ──► alloc ──► (write) ──► commit ──► … ──► release
               ▲  slots, prefix hit     │  tokens whose keys and values are now stored
               └────────────────────────┘  extend: ids of tokens to come; truncate: drafts taken back

A sequence has a length (tokens stored) and pages that cover it and the slots it asked for. A page is open
while its sequence may still write it. It closes, and is never written again, when it is full and none of its
tokens can be taken back any more. Only closed pages are shared, by a prefix hit or by a fork.

Layer groups that grow with the sequence (full, mla) share page ids: one pool, one page table. Each windowed
group (sliding_window, chunked) has a pool of its own. shared and linear groups have no pages.

One ledger is one replica. Each method holds the ledger's lock; what it returns belongs to the caller. The work is
done by an engine (`kvcfg.cache.engine`): the Python one does everything, the compiled one the plain case, faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock

from kvcfg.cache.compiled_steps import compiled_steps
from kvcfg.cache.engine import Held, LedgerEngine
from kvcfg.cache.metrics import LedgerCounters, LedgerMetrics
from kvcfg.cache.pages import (
    PAGELESS,
    Allocation,
    Commit,
    Forecast,
    GroupKind,
    PageCopy,
    PageGroup,
    PageRun,
    PageTable,
    SeqId,
)
from kvcfg.cache.prefix import PageHasher, token_ids
from kvcfg.cache.refusal import not_pinned, pin_in_use
from kvcfg.cache.steps import LedgerSteps
from kvcfg.cache.tracks import PageTracks
from kvcfg.errors import ConfigError, Problem

__all__ = [
    "Allocation",
    "Commit",
    "Forecast",
    "GroupKind",
    "LedgerMetrics",
    "PageCopy",
    "PageGroup",
    "PageLedger",
    "PageRun",
    "PageTable",
    "SeqId",
]


class PageLedger:
    """Pages, prefix cache and sequences of one replica.

    Args:
        num_pages: pages of the growing groups' pool, the null page not counted; its id is `num_pages`.
        page_size: tokens in a page.
        groups: the layer groups.
        enable_prefix_caching: find and keep closed pages by content. A linear group cannot resume from a page,
            so with one among the groups nothing is kept or found.
        eviction: which cached page goes first: a name in `kvcfg.cache.eviction.POLICIES`.
        hasher: names pages by content; None = sha256 without a namespace.
        num_draft_tokens: tokens of a commit that `truncate` may take back, unless the commit says otherwise.
        reads_first: whether the caller reads what a step's queries see before it stores the step's tokens.
            Then `alloc` gives up pages that no later query sees, and a windowed group never holds more than
            window and step need; otherwise `commit` does.
        verify_tokens: keep each cached page's token ids and compare them on a hit.
        reuse_partial_pages: where the run of cached pages ends, copy the cached page that begins like the next one;
            only growing groups can. Keeps each cached page's token ids.
        bytes_for_pages: memory that a number of pages would take, for the override that an error offers.
        clock: seconds, for page lifetimes.
        compiled: use the compiled engine where it can do what is asked; it does the same, several times faster.

    Raises:
        ConfigError: if a number is below 1 or the policy is unknown.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        groups: Sequence[PageGroup] = (PageGroup("kv"),),
        *,
        enable_prefix_caching: bool = True,
        eviction: str = "lru",
        hasher: PageHasher | None = None,
        num_draft_tokens: int = 0,
        reads_first: bool = False,
        verify_tokens: bool = False,
        reuse_partial_pages: bool = False,
        bytes_for_pages: Callable[[int], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        compiled: bool = True,
    ) -> None:
        for key, value, least in (("num_pages", num_pages, 0), ("cache.kv_cache_page_size", page_size, 1)):
            if value < least:
                raise ConfigError(Problem(key, f"must be at least {least}", value))
        self.num_pages, self.page_size, self.groups = num_pages, page_size, tuple(groups)
        stores_pages = any(group.kind not in PAGELESS for group in self.groups)
        can_resume = stores_pages and all(group.kind != "linear" for group in self.groups)
        names_pages = (hasher or PageHasher()) if enable_prefix_caching and can_resume else None
        engine: LedgerEngine | None = None
        if compiled and eviction == "lru" and not verify_tokens and not reuse_partial_pages:
            engine = compiled_steps(
                self.groups, num_pages, page_size, names_pages, num_draft_tokens, bytes_for_pages, clock
            )
        if engine is None:
            tracks = PageTracks(
                self.groups,
                num_pages,
                page_size,
                eviction,
                verify=verify_tokens,
                reads_first=reads_first,
                keeps_beginnings=reuse_partial_pages,
                counters=LedgerCounters(),
            )
            engine = LedgerSteps(tracks, names_pages, num_draft_tokens, bytes_for_pages, clock)
        self._engine = engine
        self._pins: dict[Hashable, Held] = {}
        self._lock = Lock()

    # Life of a sequence

    def claim(
        self,
        seq_id: SeqId,
        tokens: Iterable[int] | None = None,
        *,
        salt: bytes = b"",
        names: Sequence[Hashable] | None = None,
        priority: int = 0,
    ) -> None:
        """Begin a sequence; it has no pages yet.

        Args:
            seq_id: any hashable name that is not in use.
            tokens: ids known so far (list, array or tensor of integers). None = ids will never be known; such a
                sequence is neither looked up nor cached.
            salt: sequences share pages only under equal salts (one per tenant).
            names: names of the sequence's first full pages, where something else names them. All of them may
                be found, the last token's included.
            priority: for the `priority` eviction policy: pages of lower priority go first.

        Raises:
            ValueError: if `seq_id` is in use, or an id does not fit in int32.
        """
        with self._lock:
            self._engine.claim(seq_id, tokens, salt, names, priority)

    def extend(self, seq_id: SeqId, tokens: Iterable[int]) -> None:
        """Add ids of tokens that follow (sampled, drafted, the next turn's) before they are committed.

        Raises:
            ValueError: if the sequence is unknown, was claimed without ids, or an id does not fit in int32.
        """
        added = token_ids(tokens)
        with self._lock:
            self._engine.extend(seq_id, added)

    def alloc(self, seq_id: SeqId, num_new_tokens: int, *, lookahead: int = 0) -> Allocation:
        """Make room for tokens beyond the sequence's length: whole, or CapacityError and nothing changed.

        With more than one new token the prefix cache is asked first, and the length advances over what it holds,
        though never over the last of the new tokens: at least one is computed. Repeating a call takes nothing
        more. Where partial pages are reused, a page of the sequence may begin as a copy of a cached one. A windowed
        group gets pages only for new tokens that a query after the coming commit can see; the
        caller hands the others to this step's attention without storing them.

        Args:
            seq_id: a claimed sequence.
            num_new_tokens: tokens to come, counted from the length before this call.
            lookahead: slots beyond them (drafts); not counted as input.

        Raises:
            CapacityError: if pages do not suffice; it names need, free, evictable and an override that helps.
            ValueError: if the sequence is unknown or a number is negative.
        """
        with self._lock:
            return self._engine.alloc(seq_id, num_new_tokens, lookahead)

    def commit(self, seq_id: SeqId, num_tokens: int, *, num_drafts: int | None = None, copied: bool = False) -> Commit:
        """Count tokens as stored: the length advances, pages that are full and final close.

        Args:
            seq_id: a claimed sequence.
            num_tokens: tokens written since the last commit.
            num_drafts: how many of the last tokens `truncate` may take back; None = the ledger's num_draft_tokens.
            copied: whether they were not computed but copied from elsewhere; then they count as cached.

        Raises:
            ValueError: if the sequence is unknown, or has no slots or ids for as many tokens.
        """
        with self._lock:
            done = self._engine.commit((seq_id,), num_tokens, num_drafts)
            if copied:
                self._engine.count_copied(num_tokens)
            return done

    def alloc_batch(
        self,
        seq_ids: Sequence[SeqId],
        num_new_tokens: int = 1,
        *,
        tokens: Iterable[int] | None = None,
        lookahead: int = 0,
    ) -> tuple[PageRun, ...]:
        """One step of a batch: room for as many new tokens of every sequence, or nothing changed for any.

        The prefix cache is not asked; sequences that could find something there go through `alloc`.

        Args:
            seq_ids: claimed sequences, each once.
            num_new_tokens: tokens to come for each.
            tokens: for one new token each, its ids, one a sequence, added as by `extend`; None if they are known
                already or never will be.
            lookahead: slots beyond them for each.

        Returns:
            The runs of page tables that are new; most decode steps have none.

        Raises:
            CapacityError: if pages do not suffice for all.
            ValueError: if a sequence is unknown or named twice, or `tokens` are not one each.
        """
        ids = None if tokens is None else token_ids(tokens)
        if ids is not None and (num_new_tokens != 1 or len(ids) != len(seq_ids)):
            raise ValueError(f"{len(ids)} token ids do not make {num_new_tokens} for each of {len(seq_ids)} sequences")
        with self._lock:
            return self._engine.alloc_batch(seq_ids, num_new_tokens, ids, lookahead)

    def commit_batch(self, seq_ids: Sequence[SeqId], num_tokens: int = 1, *, num_drafts: int | None = None) -> Commit:
        """`commit` for every sequence of a batch, or for none."""
        with self._lock:
            return self._engine.commit(seq_ids, num_tokens, num_drafts)

    def truncate(self, seq_id: SeqId, length: int) -> None:
        """Take back tokens: length and ids end at `length`, pages and slots after it are free.

        Raises:
            ValueError: if the sequence is unknown or shorter; if `length` lies inside a closed page, which is never
                opened again; if a window has moved on past it.
        """
        with self._lock:
            self._engine.truncate(seq_id, length)

    def fork(self, parent: SeqId, child: SeqId) -> tuple[PageCopy, ...]:
        """Begin `child` as a copy of `parent`: closed pages are shared, open ones get a page of their own.

        Returns:
            The copies of open pages that the caller must make before either sequence is written.

        Raises:
            CapacityError: if there is no page for an open one; nothing changed.
            ValueError: if the parent is unknown or the child is in use.
        """
        with self._lock:
            return self._engine.fork(parent, child)

    def release(self, seq_id: SeqId, *, head_first: bool = False) -> None:
        """End a sequence. Its pages are free again; what they hold stays cached until they are handed out.

        Args:
            seq_id: a claimed sequence.
            head_first: let its first page be handed out before its last one; by default prefixes outlive what
                follows them.

        Raises:
            ValueError: if the sequence is unknown.
        """
        with self._lock:
            self._engine.release(seq_id, head_first)

    # The prefix cache

    def pin(self, name: Hashable, seq_id: SeqId) -> int:
        """Keep the closed pages of a sequence from eviction until `unpin(name)`, whatever becomes of the sequence.

        Returns:
            Pages held, over all pools.

        Raises:
            ValueError: if the name is in use or the sequence unknown.
        """
        with self._lock:
            self._check_pin(name)
            return sum([len(pages) for pages in self._hold(name, self._engine.closed_pages(seq_id))])

    def lend(self, name: Hashable, page_names: Sequence[Hashable]) -> tuple[int, ...]:
        """Pin the pages of the longest run of these names, so that another replica can copy them, until `unpin(name)`.

        Nothing is lent where windows would need pages of their own.

        Returns:
            Their ids, the same in every growing group.

        Raises:
            ValueError: if the name is in use.
        """
        with self._lock:
            self._check_pin(name)
            held = self._hold(name, self._engine.find(page_names))
            return tuple(held[0]) if held else ()

    def unpin(self, name: Hashable) -> None:
        """Let go of pinned pages.

        Raises:
            ValueError: if nothing is pinned under the name.
        """
        with self._lock:
            if name not in self._pins:
                raise not_pinned(name)
            self._engine.drop(self._pins.pop(name))

    def reset_prefix_cache(self) -> int:
        """Forget the cached pages that no sequence uses and no pin holds; how many there were."""
        with self._lock:
            return self._engine.forget_unused()

    # Questions

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._engine

    def __len__(self) -> int:
        return len(self._engine)

    def length(self, seq_id: SeqId) -> int:
        """Tokens of a sequence that are stored."""
        with self._lock:
            return self._engine.length(seq_id)

    def room(self, seq_id: SeqId) -> int:
        """Slots that a sequence has beyond its length."""
        with self._lock:
            return self._engine.room(seq_id)

    def num_closed(self, seq_id: SeqId) -> int:
        """Pages of a sequence, from its start, that are closed."""
        with self._lock:
            return self._engine.num_closed(seq_id)

    def num_cached(self, page_names: Sequence[Hashable]) -> int:
        """How many of these names, from the first on, every growing group has a page for."""
        with self._lock:
            return self._engine.num_cached(page_names)

    def page_names(self, seq_id: SeqId, num_new_tokens: int) -> tuple[Hashable, ...]:
        """Names of the pages, after those stored in full, that `alloc` of as many tokens would look for."""
        with self._lock:
            return self._engine.page_names(seq_id, num_new_tokens)

    def page_table(self, seq_id: SeqId, group: int = 0) -> PageTable:
        """Pages of a sequence in one group; none for shared and linear groups."""
        with self._lock:
            return self._engine.table(seq_id, group)

    def forecast(self, seq_id: SeqId, num_new_tokens: int, *, lookahead: int = 0) -> Forecast:
        """What `alloc` with these arguments would do; nothing changes."""
        with self._lock:
            return self._engine.forecast(seq_id, num_new_tokens, lookahead)

    def check_integrity(self) -> None:
        """Recount everything from the sequences.

        Raises:
            AssertionError: if counts, free order, index and page tables disagree, or an open page has two holders.
        """
        with self._lock:
            self._engine.check_integrity(self._pins.values())

    def metrics(self) -> LedgerMetrics:
        """The counters as they are now."""
        with self._lock:
            return self._engine.metrics()

    def reset_metrics(self) -> None:
        """Count tokens, evictions, refusals and lifetimes from zero again."""
        with self._lock:
            self._engine.reset_metrics()

    def _check_pin(self, name: Hashable) -> None:
        if name in self._pins:
            raise pin_in_use(name)

    def _hold(self, name: Hashable, held: Held) -> Held:
        self._engine.hold(held)
        self._pins[name] = held
        return held
