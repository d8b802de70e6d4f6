"""Random lives of sequences, against a model of dicts and lists, and against what was written to the pages."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvcfg.cache.compiled_steps import compiled_steps
from kvcfg.cache.eviction import POLICIES
from kvcfg.cache.ledger import PageGroup, PageLedger
from kvcfg.errors import CapacityError

PAGES, SIZE = 10, 3
MANY = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TRUNKS = ([0] * 20, [0, 1] * 10)
prompts = st.builds(
    lambda trunk, length, tail: TRUNKS[trunk][:length] + tail,
    st.integers(0, 1),
    st.integers(0, 18),
    st.lists(st.integers(0, 1), min_size=1, max_size=2),
)
salts = st.sampled_from([b"", b"", b"other"])
numbers = st.integers(0, 8)


@dataclass
class Row:
    """A sequence of the model."""

    ids: list[int]
    salt: bytes
    priority: int
    table: list[int] = field(default_factory=list)
    length: int = 0
    final: int = 0
    counted: int = 0

    def name(self, page: int) -> Any:
        """The content of one page and all before it."""
        return self.salt, tuple(self.ids[: (page + 1) * SIZE])

    def copy(self) -> Row:
        return Row(self.ids[:], self.salt, self.priority, self.table[:], self.length, self.final, self.counted)


class Naive:
    """One pool, told with lists: slow, and short enough to be believed."""

    def __init__(self, policy: str, drafts: int, caching: bool, partial: bool) -> None:
        self.policy, self.drafts, self.caching, self.partial = policy, drafts, caching, partial
        self.free = list(range(PAGES))  # the longest free first
        self.refs = [0] * PAGES
        self.named: dict[int, Any] = {}
        self.weights: dict[str, dict[int, int]] = {name: {} for name in ("lru", "lfu", "fifo", "priority")}
        self.rows: dict[Any, Row] = {}
        self.pins: dict[Any, list[int]] = {}
        self.age = self.inputs = self.cached = self.evictions = 0

    def find(self, name: Any) -> int | None:
        return next((page for page, other in self.named.items() if other == name), None)

    def order(self, page: int) -> tuple[bool, int]:
        """What is handed out first, beside the longest free."""
        cached = page in self.named and self.policy != "lru"
        return cached, self.weights[self.policy].get(page, 0) if cached else 0

    def take(self) -> int:
        page = min(self.free, key=self.order)
        self.free.remove(page)
        self.evictions += self.named.pop(page, None) is not None
        self.refs[page] = 1
        return page

    def hold(self, page: int) -> None:
        self.refs[page] += 1
        if page in self.free:
            self.free.remove(page)

    def drop(self, page: int) -> None:
        self.refs[page] -= 1
        if not self.refs[page]:
            self.free.append(page)

    def beginning(self, row: Row, place: int, limit: int) -> tuple[int, int] | None:
        """A cached page that follows the same page and has most of the tokens from `place` to `limit`."""
        own = row.ids[place * SIZE : min(limit, (place + 1) * SIZE)]
        alike = []
        for page, (salt, ids) in self.named.items():
            if (
                salt == row.salt
                and len(ids) == (place + 1) * SIZE
                and list(ids[: place * SIZE]) == row.ids[: place * SIZE]
            ):
                other = list(ids[place * SIZE :])
                same = next((n for n, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), len(own))
                alike.append((same, other >= own, (1 if other >= own else -1) * self.rank(other), page))
        # Of equals the first one that is not before the sequence's own tokens, else the last one before them.
        best = max(alike, key=lambda item: (item[0], item[1], -item[2]), default=(0, False, 0, 0))
        return (best[3], best[0]) if place * SIZE + best[0] > row.length and best[0] else None

    def rank(self, ids: list[int]) -> int:
        """Where token ids stand among others."""
        return sum(token << (SIZE - number) for number, token in enumerate(ids))

    def alloc(self, row: Row, count: int, lookahead: int) -> tuple[int, list[tuple[int, int]]] | None:
        """Cached tokens and pages to copy, or None if refused."""
        target, closed, hits = row.length + count, row.final // SIZE, []
        if count > 1 and self.caching:
            for place in range(closed, (min(target - 1, len(row.ids))) // SIZE):
                page = self.find(row.name(place))
                if page is None:
                    break
                hits.append(page)
        if (closed + len(hits)) * SIZE <= row.length:
            hits = []
        surrendered = row.table[closed:] if hits else []
        kept = row.table[:closed] if hits else row.table
        needed = max(0, -(-(target + lookahead) // SIZE) - len(kept) - len(hits))
        free = len(self.free) - sum(page in self.free for page in hits) + len(surrendered)
        if needed > free:
            return None
        place, source = closed + len(hits), None
        if self.partial and self.caching and count > 1:
            source = self.beginning(row, place, target - 1)
        if source and needed > free - (source[0] in self.free):
            source = None
        for page in hits:
            self.hold(page)
            self.weights["lfu"][page] += 1
        if source:
            self.hold(source[0])
        for page in reversed(surrendered):
            self.drop(page)
        row.table = kept + hits + [self.take() for _ in range(needed)]
        if source:
            self.drop(source[0])
        before = row.length
        if hits:
            row.length = row.final = place * SIZE
        if source:
            row.length = row.final = place * SIZE + source[1]
        cached = row.length - before
        self.cached += cached
        self.inputs += max(0, target - max(row.counted, row.length))
        row.counted = max(row.counted, target, row.length)
        return cached, [(source[0], row.table[place])] if source else []

    def commit(self, row: Row, count: int) -> None:
        row.length += count
        before, row.final = row.final // SIZE, max(row.final, row.length - self.drafts)
        self.age += 1
        for place in range(before, row.final // SIZE if self.caching else 0):
            mine, other = row.table[place], self.find(row.name(place))
            if other is None:
                self.named[mine] = row.name(place)
                for name, weight in (("lfu", 0), ("fifo", self.age), ("priority", row.priority)):
                    self.weights[name][mine] = weight
            elif other != mine:
                row.table[place] = other
                self.hold(other)
                self.drop(mine)

    def cut(self, row: Row, length: int) -> None:
        keep = -(-length // SIZE)
        for page in reversed(row.table[keep:]):
            self.drop(page)
        del row.table[keep:], row.ids[length:]
        row.length, row.final = length, min(row.final, length)

    def reset(self) -> int:
        gone = [page for page in self.named if not self.refs[page]]
        self.free.sort(key=self.order)
        for page in gone:
            del self.named[page]
        return len(gone)


class LedgerMachine(RuleBasedStateMachine):
    """The ledger does what the model does: same pages, same lengths, same refusals."""

    policy, drafts, caching, compiled, partial = "lru", 0, True, False, False

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(
            PAGES,
            SIZE,
            eviction=self.policy,
            num_draft_tokens=self.drafts,
            enable_prefix_caching=self.caching,
            reuse_partial_pages=self.partial,
            compiled=self.compiled,
        )
        self.model = Naive(self.policy, self.drafts, self.caching, self.partial)
        self.written: dict[tuple[int, int], Any] = {}
        self.next_id = 0

    def pick(self, number: int) -> tuple[Any, Row] | None:
        rows = list(self.model.rows.items())
        return rows[number % len(rows)] if rows else None

    def write(self, row: Row, start: int, end: int) -> None:
        """Store tokens as an engine would: each slot remembers the whole prefix it belongs to."""
        for position in range(start, end):
            self.written[row.table[position // SIZE], position % SIZE] = (row.salt, tuple(row.ids[: position + 1]))

    @rule(ids=prompts, salt=salts, priority=st.integers(0, 2))
    def claim(self, ids: list[int], salt: bytes, priority: int) -> None:
        self.ledger.claim(self.next_id, ids, salt=salt, priority=priority)
        self.model.rows[self.next_id] = Row(ids[:], salt, priority)
        self.next_id += 1

    @rule(ids=prompts, salt=salts, priority=st.integers(0, 2), keep=st.booleans())
    def serve(self, ids: list[int], salt: bytes, priority: int, keep: bool) -> None:
        """A whole life at once, so that much is cached and little is in use."""
        self.claim(ids, salt, priority)
        self.step(len(self.model.rows) - 1, len(ids), len(ids), 0)
        if not keep:
            self.release(len(self.model.rows) - 1, False)

    @rule(number=numbers, ids=prompts)
    def extend(self, number: int, ids: list[int]) -> None:
        if chosen := self.pick(number):
            self.ledger.extend(chosen[0], ids)
            chosen[1].ids += ids

    @rule(number=numbers, count=st.integers(0, 20), stored=st.integers(0, 20), lookahead=st.integers(0, 4))
    def step(self, number: int, count: int, stored: int, lookahead: int) -> None:
        if not (chosen := self.pick(number)):
            return
        seq_id, row = chosen
        count = min(count, len(row.ids) - row.length)
        forecast = self.ledger.forecast(seq_id, count, lookahead=lookahead)
        free, before = len(self.model.free), [row.copy() for row in self.model.rows.values()]
        found = self.model.alloc(row, count, lookahead)
        assert forecast.fits == (found is not None)
        if found is None:
            with pytest.raises(CapacityError, match="out of pages"):
                self.ledger.alloc(seq_id, count, lookahead=lookahead)
            assert before == [row.copy() for row in self.model.rows.values()]
            return
        cached, copies = found
        done = self.ledger.alloc(seq_id, count, lookahead=lookahead)
        assert [(copy.source, copy.target) for copy in done.copies] == copies
        for source, target in copies:
            for offset in range(SIZE):
                self.written[target, offset] = self.written.get((source, offset))
        assert (done.cached_tokens, done.length) == (cached, row.length) == (forecast.cached_tokens, row.length)
        if not cached:
            assert free - len(self.model.free) == forecast.pages
        stored = min(stored, count - cached) if count > cached else 0
        self.write(row, row.length, row.length + stored)
        closed = self.ledger.commit(seq_id, stored).closed
        first = row.final // SIZE
        self.model.commit(row, stored)
        assert [page for run in closed for page in run.pages] == row.table[first : row.final // SIZE]

    @rule(picks=st.lists(numbers, min_size=1, max_size=4), token=st.integers(0, 1))
    def decode(self, picks: list[int], token: int) -> None:
        chosen = {
            pick[0]: pick[1] for number in picks if (pick := self.pick(number)) and pick[1].length == len(pick[1].ids)
        }
        needed = sum(row.length + 1 > len(row.table) * SIZE for row in chosen.values())
        if needed > len(self.model.free):
            with pytest.raises(CapacityError):
                self.ledger.alloc_batch(list(chosen), tokens=[token] * len(chosen))
            return
        self.ledger.alloc_batch(list(chosen), tokens=[token] * len(chosen))
        for row in chosen.values():
            assert self.model.alloc(row, 1, 0) == (0, [])
            row.ids.append(token)
            self.write(row, row.length, row.length + 1)
        self.ledger.commit_batch(list(chosen))
        for row in chosen.values():
            self.model.commit(row, 1)

    @rule(number=numbers, back=st.integers(0, 6))
    def truncate(self, number: int, back: int) -> None:
        if not (chosen := self.pick(number)):
            return
        seq_id, row = chosen
        length = row.length - back
        if length < 0 or (length % SIZE and length < row.final // SIZE * SIZE):
            with pytest.raises(ValueError, match="cannot cut"):
                self.ledger.truncate(seq_id, length)
            return
        self.ledger.truncate(seq_id, length)
        self.model.cut(row, length)

    @rule(number=numbers)
    def fork(self, number: int) -> None:
        if not (chosen := self.pick(number)):
            return
        seq_id, row = chosen
        closed, used = row.final // SIZE, -(-row.length // SIZE)
        if used - closed > len(self.model.free):
            with pytest.raises(CapacityError):
                self.ledger.fork(seq_id, self.next_id)
            return
        copies = self.ledger.fork(seq_id, self.next_id)
        child = row.copy()
        for page in row.table[:closed]:
            self.model.hold(page)
        child.table = row.table[:closed] + [self.model.take() for _ in range(used - closed)]
        assert [(copy.source, copy.target) for copy in copies] == list(
            zip(row.table[closed:used], child.table[closed:], strict=True)
        )
        for copy in copies:
            for offset in range(SIZE):
                self.written[copy.target, offset] = self.written.get((copy.source, offset))
        self.model.rows[self.next_id] = child
        self.next_id += 1

    @rule(number=numbers, head_first=st.booleans())
    def release(self, number: int, head_first: bool) -> None:
        if chosen := self.pick(number):
            self.ledger.release(chosen[0], head_first=head_first)
            table = self.model.rows.pop(chosen[0]).table
            for page in table if head_first or not self.caching else reversed(table):
                self.model.drop(page)

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        if (chosen := self.pick(number)) and chosen[0] not in self.model.pins:
            pages = chosen[1].table[: chosen[1].final // SIZE]
            assert self.ledger.pin(chosen[0], chosen[0]) == len(pages)
            for page in pages:
                self.model.hold(page)
            self.model.pins[chosen[0]] = pages

    @rule(number=numbers)
    def unpin(self, number: int) -> None:
        if self.model.pins:
            name = list(self.model.pins)[number % len(self.model.pins)]
            self.ledger.unpin(name)
            for page in reversed(self.model.pins.pop(name)):
                self.model.drop(page)

    @rule()
    def reset(self) -> None:
        assert self.ledger.reset_prefix_cache() == self.model.reset()

    @invariant()
    def counts_are_right(self) -> None:
        self.ledger.check_integrity()
        metrics, model = self.ledger.metrics(), self.model
        assert metrics.free_pages == len(model.free)
        assert metrics.cached_pages == len(model.named)
        assert metrics.evictable_pages == sum(not model.refs[page] for page in model.named)
        assert metrics.evictions == model.evictions == sum(metrics.page_lifetimes.values())
        assert (metrics.input_tokens, metrics.cache_tokens) == (model.inputs, model.cached)

    @invariant()
    def sequences_read_what_was_written(self) -> None:
        for seq_id, row in self.model.rows.items():
            assert self.ledger.length(seq_id) == row.length
            first, pages = self.ledger.page_table(seq_id)
            assert (first, list(pages)) == (0, row.table)
            for position in range(row.length):
                content = self.written[pages[position // SIZE], position % SIZE]
                assert content == (row.salt, tuple(row.ids[: position + 1]))

    def teardown(self) -> None:
        for seq_id in list(self.model.rows):
            self.ledger.release(seq_id)
        for name in self.model.pins:
            self.ledger.unpin(name)
        self.ledger.check_integrity()
        assert self.ledger.metrics().used_pages == 0


def run(**options: Any) -> None:
    if options.get("compiled") and compiled_steps([PageGroup("kv")], 1, 1, None, 0, None, time.monotonic) is None:
        pytest.skip("no C++ compiler")
    run_state_machine_as_test(type("Machine", (LedgerMachine,), options), settings=MANY)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_ledger_agrees_with_the_model(policy: str, drafts: int) -> None:
    run(policy=policy, drafts=drafts)


@pytest.mark.parametrize("drafts", [0, 2])
def test_compiled_ledger_agrees_with_the_model(drafts: int) -> None:
    run(compiled=True, drafts=drafts)


@pytest.mark.parametrize("compiled", [False, True])
def test_ledger_agrees_with_the_model_without_a_prefix_cache(compiled: bool) -> None:
    run(compiled=compiled, caching=False)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_ledger_agrees_with_the_model_where_partial_pages_are_reused(policy: str) -> None:
    run(partial=True, policy=policy)
