"""Layer groups that see only a window: what a query can see is stored, what it cannot see is given up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvcfg.cache.ledger import Allocation, PageGroup, PageLedger
from kvcfg.errors import CapacityError, ConfigError
from kvcfg.units import ceil_div

SIZE = 4
KINDS = ("sliding_window", "chunked")


class Engine:
    """Writes tokens where the ledger says, and reads at every step what its queries see.

    Each slot holds the whole prefix that its token belongs to, so a wrong page is never mistaken for the right one.
    """

    def __init__(self, groups: list[PageGroup], num_pages: int = 40, **options: Any) -> None:
        self.ledger = PageLedger(num_pages, SIZE, groups, **options)
        self.reads_first = options.get("reads_first", False)
        self.slots: list[dict[tuple[int, int], Any]] = [{} for _ in groups]
        self.ids: dict[Any, list[int]] = {}

    def claim(self, seq_id: Any, ids: list[int]) -> None:
        self.ledger.claim(seq_id, ids)
        self.ids[seq_id] = ids

    def first_seen(self, group: PageGroup, position: int) -> int:
        if group.window is None:
            return 0
        return (
            position // group.window * group.window if group.kind == "chunked" else max(0, position - group.window + 1)
        )

    def check_past(self, seq_id: Any, length: int) -> None:
        """All that the next query sees is there."""
        for number, group in enumerate(self.ledger.groups):
            if group.kind == "shared":
                continue
            first, pages = self.ledger.page_table(seq_id, number)
            for position in range(self.first_seen(group, length), length):
                found = self.slots[number].get((pages[position // SIZE - first], position % SIZE))
                assert found == tuple(self.ids[seq_id][: position + 1]), (group, position, length)

    def step(self, seq_id: Any, count: int, num_drafts: int | None = None) -> int:
        """One forward pass; the number of cached tokens."""
        if self.reads_first:
            self.check_past(seq_id, self.ledger.length(seq_id))
        done = self.ledger.alloc(seq_id, count)
        if not self.reads_first:
            self.check_past(seq_id, done.length)
        start, end = done.length, done.length - done.cached_tokens + count
        for number, group in enumerate(self.ledger.groups):
            if group.kind == "shared":
                continue
            first, pages = self.ledger.page_table(seq_id, number)
            for position in range(max(start, first * SIZE), end):
                page = pages[position // SIZE - first]
                self.slots[number][page, position % SIZE] = tuple(self.ids[seq_id][: position + 1])
        self.ledger.commit(seq_id, end - start, num_drafts=num_drafts)
        self.ledger.check_integrity()
        self.check_past(seq_id, end)
        return done.cached_tokens

    def take_back(self, seq_id: Any, count: int) -> None:
        """The last tokens were wrong: others come in their place."""
        length = self.ledger.length(seq_id) - count
        self.ledger.truncate(seq_id, length)
        self.ids[seq_id] = self.ids[seq_id][:length] + [9] * count
        self.ledger.extend(seq_id, [9] * count)
        self.check_past(seq_id, length)

    def release(self, seq_id: Any) -> None:
        self.ledger.release(seq_id)
        del self.ids[seq_id]


def groups_of(kind: Any, window: int, num_pages: int) -> list[PageGroup]:
    return [PageGroup("global"), PageGroup("local", kind, window, num_pages), PageGroup("tied", "shared")]


def pages_per_sequence(kind: str, window: int, drafts: int) -> int:
    """Pages that a window can touch, wherever it starts in a page."""
    return ceil_div(SIZE - 1 + window + drafts, SIZE)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [1, 3, 4, 6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_random_steps_find_all_that_a_window_sees(kind: str, window: int, seed: int) -> None:
    rng = random.Random(f"{kind}{window}{seed}")
    drafts = rng.randrange(3)
    engine = Engine(groups_of(kind, window, 14), num_draft_tokens=drafts, eviction=rng.choice(["lru", "lfu"]))
    cached = refused = 0
    for name in range(60):
        length = rng.randrange(1, 40)
        engine.claim(name, [0] * rng.randrange(length) + [rng.randrange(3) for _ in range(length)])
        try:
            while (left := len(engine.ids[name]) - engine.ledger.length(name)) > 0:
                count = min(left, rng.choice([1, 1, 2, 7, 40]))
                hit = engine.step(name, count)
                cached += hit
                if rng.random() < 0.2:
                    engine.take_back(name, rng.randrange(min(drafts, count - hit) + 1))
        except CapacityError:
            refused += 1
            engine.ledger.check_integrity()
            for other in list(engine.ids):
                engine.release(other)
        else:
            if rng.random() < 0.7:
                engine.release(name)
        engine.ledger.check_integrity()
    assert cached and refused


@pytest.mark.parametrize("steps", [[1] * 40, [40], [7] * 6, [13, 1, 1, 20, 5]])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("window", [1, 4, 6, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_first_a_sequence_needs_only_the_pages_of_its_window(
    kind: str, window: int, drafts: int, steps: list[int]
) -> None:
    pool = pages_per_sequence(kind, window, drafts + 1)
    engine = Engine(
        groups_of(kind, window, pool), reads_first=True, num_draft_tokens=drafts, enable_prefix_caching=False
    )
    engine.claim(0, list(range(sum(steps))))
    for count in steps:
        engine.step(0, count)
    assert engine.ledger.length(0) == sum(steps)


def test_pages_out_of_sight_are_dropped_and_told() -> None:
    ledger = PageLedger(0, SIZE, [PageGroup("local", "sliding_window", 4, 8)], enable_prefix_caching=False)
    ledger.claim(0)
    dropped = []
    for _ in range(3):
        ledger.alloc(0, 4)
        dropped += ledger.commit(0, 4).dropped
    assert [(run.first, run.pages) for run in dropped[:2]] == [(0, (0,)), (1, (1,))]
    assert ledger.metrics().used_pages == len(ledger.page_table(0).pages) == 3 - len(dropped)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_stored_as_far_as_it_will_be_seen(kind: Any) -> None:
    ledger = PageLedger(10, SIZE, groups_of(kind, 4, 2))
    ledger.claim(0, range(33))
    ledger.alloc(0, 33)
    assert len(ledger.page_table(0, 0).pages) == 9
    assert ledger.page_table(0, 1).first == (8 if kind == "chunked" else 7)


def test_part_of_a_step_cannot_be_committed_if_it_was_not_stored() -> None:
    ledger = PageLedger(10, SIZE, groups_of("sliding_window", 4, 2))
    ledger.claim(0, range(33))
    ledger.alloc(0, 33)
    with pytest.raises(ValueError, match="cannot commit sequence 0 up to 8 tokens"):
        ledger.commit(0, 8)
    assert ledger.length(0) == 0


def test_a_prefix_hit_needs_every_window() -> None:
    ledger = PageLedger(40, SIZE, groups_of("sliding_window", 6, 6))
    ledger.claim("first", range(24))
    ledger.alloc("first", 24)
    ledger.commit("first", 24)
    ledger.release("first")
    ledger.claim("short", range(16))
    assert ledger.alloc("short", 16).cached_tokens == 0
    ledger.claim("long", range(28))
    assert ledger.alloc("long", 28).cached_tokens == 24
    assert ledger.page_table("long", 1) == (4, (*ledger.page_table("long", 1).pages,))


def test_the_hit_is_the_longest_that_all_windows_share() -> None:
    groups = [PageGroup("near", "sliding_window", 4, 20), PageGroup("far", "sliding_window", 12, 20)]
    ledger = PageLedger(0, SIZE, groups)
    ledger.claim("first", range(40))
    for _ in range(10):
        ledger.alloc("first", 4)
        ledger.commit("first", 4)
    ledger.release("first")
    ledger.claim("second", [*range(30), *range(10)])
    assert ledger.alloc("second", 40).cached_tokens == 28
    ledger.check_integrity()


def test_a_linear_group_keeps_a_prefix_from_being_found() -> None:
    ledger = PageLedger(10, SIZE, [PageGroup("full"), PageGroup("state", "linear")])
    for name in ("first", "second"):
        ledger.claim(name, range(12))
        assert ledger.alloc(name, 12).cached_tokens == 0
        ledger.commit(name, 12)
    assert ledger.metrics().cached_pages == 0
    assert ledger.page_table("first", 1) == (0, ())


def test_groups_without_pages_need_none() -> None:
    ledger = PageLedger(0, SIZE, [PageGroup("state", "linear"), PageGroup("tied", "shared")])
    for name in ("first", "second"):
        ledger.claim(name, range(12))
        assert ledger.alloc(name, 12) == Allocation(0, 0, ())
        ledger.commit(name, 12)
    ledger.check_integrity()


def test_growing_groups_share_page_ids() -> None:
    ledger = PageLedger(10, SIZE, [PageGroup("target"), PageGroup("draft"), PageGroup("latent", "mla")])
    ledger.claim(0, range(9))
    runs = ledger.alloc(0, 9).new_pages
    assert [(run.group, run.pages) for run in runs] == [(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (0, 1, 2))]
    assert ledger.metrics().used_pages == 3


def test_a_windowed_group_that_is_short_leaves_the_others_alone() -> None:
    ledger = PageLedger(40, SIZE, groups_of("sliding_window", 8, 3))
    ledger.claim(0, range(20))
    ledger.alloc(0, 20)
    ledger.claim(1, range(20))
    with pytest.raises(CapacityError, match=r"needs 2 pages of 4 tokens in local, 1 of 3 are free"):
        ledger.alloc(1, 20)
    assert ledger.page_table(1, 0) == (0, ())
    ledger.check_integrity()


@pytest.mark.parametrize("missing", [{"window": None, "num_pages": 4}, {"window": 4, "num_pages": None}])
def test_a_windowed_group_needs_window_and_pages(missing: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1 for sliding_window"):
        PageGroup("local", "sliding_window", **missing)
