"""The compiled engine does what the Python one does, where it is used."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvcfg.cache import compiled_steps
from kvcfg.cache.compiled_steps import CompiledSteps
from kvcfg.cache.ledger import PageGroup, PageLedger
from kvcfg.cache.prefix import PageHasher
from kvcfg.cache.steps import LedgerSteps
from kvcfg.errors import BackendUnavailable, CapacityError
from kvcfg.kernels.cpu.page_core import core_functions

SIZE = 4
GROUPS = [PageGroup("full"), PageGroup("latent", "mla"), PageGroup("tied", "shared")]

needs_compiler = pytest.mark.skipif(core_functions() is None, reason="no C++ compiler")


def engine(**options: Any) -> type:
    return type(PageLedger(8, SIZE, **options)._engine)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"groups": GROUPS}, {"enable_prefix_caching": False}, {"num_draft_tokens": 3}])
def test_the_plain_case_is_compiled(options: dict[str, Any]) -> None:
    assert engine(**options) is CompiledSteps


@pytest.mark.parametrize(
    "options",
    [
        {"compiled": False},
        {"eviction": "lfu"},
        {"verify_tokens": True},
        {"reuse_partial_pages": True},
        {"groups": [PageGroup("full"), PageGroup("window", "sliding_window", 4, 8)]},
        {"groups": [PageGroup("tied", "shared")]},
        {"hasher": type("Other", (PageHasher,), {})()},
    ],
)
def test_all_else_is_python(options: dict[str, Any]) -> None:
    assert engine(**options) is LedgerSteps


def test_without_a_compiler_it_is_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "core_functions", lambda: None)
    assert engine() is LedgerSteps


class Twins:
    """Two ledgers that are asked the same, and must answer the same."""

    def __init__(self, seed: int, algorithm: str, **options: Any) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.ledgers = [
            PageLedger(
                60,
                SIZE,
                GROUPS,
                hasher=PageHasher(algorithm),
                clock=lambda: self.now,
                bytes_for_pages=lambda pages: 10 * pages,
                compiled=compiled,
                **options,
            )
            for compiled in (False, True)
        ]
        self.trunks = [[self.rng.randrange(9) for _ in range(60)] for _ in range(3)]
        self.names: list[int] = []

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        answers = []
        for ledger in self.ledgers:
            try:
                answers.append(getattr(ledger, method)(*arguments, **options))
            except (CapacityError, ValueError) as error:
                answers.append((type(error), str(error)))
        assert answers[0] == answers[1], (method, arguments, options)
        return answers[0]

    def prompt(self) -> list[int]:
        trunk = self.rng.choice(self.trunks)
        return trunk[: self.rng.randrange(60)] + [self.rng.randrange(9) for _ in range(self.rng.randrange(1, 9))]

    def turn(self, number: int) -> None:
        """One random thing."""
        rng, known = self.rng, self.names
        self.now += rng.choice([0.0, 0.1, 3.0])
        name = rng.choice(known) if known else number
        count = rng.randrange(25)
        match rng.randrange(13):
            case 0 | 1 | 2:
                ids = self.prompt()
                given = (
                    {"names": [sum(ids[: end + 1]) for end in range(0, len(ids), SIZE)]} if rng.random() < 0.2 else {}
                )
                self.ask("claim", number, ids if not given or rng.random() < 0.5 else None, **given)
                self.ask("forecast", number, len(ids))
                self.ask("alloc", number, len(ids), lookahead=rng.randrange(3))
                self.ask("commit", number, max(0, len(ids) - self.ask("length", number)))
                known.append(number)
            case 3:
                self.ask("alloc", name, count, lookahead=rng.randrange(3))
            case 4:
                self.ask("commit", name, count, num_drafts=rng.choice([None, 2]))
            case 5:
                self.ask("extend", name, self.prompt())
            case 6 | 7:
                batch = rng.sample(known, min(len(known), 5))
                self.ask("alloc_batch", batch, tokens=[rng.randrange(9) for _ in batch])
                self.ask("commit_batch", batch)
            case 8:
                self.ask("truncate", name, rng.randrange(30))
            case 9:
                if not isinstance(self.ask("fork", name, number)[:1], tuple) or number in self.ledgers[0]:
                    known.append(number)
            case 10:
                self.ask("pin", ("pin", number % 4), name)
                self.ask("unpin", ("pin", (number + 2) % 4))
            case 11:
                self.ask("num_cached", self.ask("page_names", name, 40))
                if rng.random() < 0.2:
                    self.ask("reset_prefix_cache")
            case 12 if known:
                known.remove(name)
                self.ask("release", name, head_first=rng.random() < 0.5)

    def compare(self) -> None:
        for method in ("check_integrity", "metrics", "__len__"):
            self.ask(method)
        for name in self.names:
            for method in ("page_table", "length", "room"):
                self.ask(method, name)
            self.ask("page_table", name, 2)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"num_draft_tokens": 3}, {"enable_prefix_caching": False}])
@pytest.mark.parametrize("algorithm", ["sha256", "xxh3_128"])
@pytest.mark.parametrize("seed", range(4))
def test_both_engines_give_the_same_answers(seed: int, algorithm: str, options: dict[str, Any]) -> None:
    try:
        twins = Twins(seed, algorithm, **options)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    for number in range(600):
        twins.turn(number)
        twins.compare()


@needs_compiler
def test_names_from_outside_are_forgotten_with_their_pages() -> None:
    ledger = PageLedger(8, SIZE)
    for number in range(0, 9000, 3):
        ledger.claim(number, names=[number, number + 1, number + 2])
        ledger.alloc(number, 12)
        ledger.commit(number, 12)
        ledger.release(number)
    assert isinstance(ledger._engine, CompiledSteps)
    assert len(ledger._engine._names) < 2000
    ledger.claim("last", names=[8997, 8998, 8999])
    assert ledger.alloc("last", 12).cached_tokens == 12
