"""Calls take turns: each has as many as the others, and short ones repeat within a turn."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kvcfg.evaluation import turns
from kvcfg.evaluation.turns import MIN_TURN_S, Turn, take_turns


class Clock:
    """A clock that goes on only while a call works, and what was called."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.calls.append(name)
            self.now += seconds

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(
        turns, "time", SimpleNamespace(perf_counter=lambda: made.now, process_time=lambda: 2 * made.now)
    )
    return made


def test_figure_is_the_median_of_the_rounds() -> None:
    assert Turn(lambda: None, [3.0, 1.0, 9.0]).seconds == 3.0


def test_cpu_time_is_counted_beside(clock: Clock) -> None:
    turn = Turn(clock.call("a", 2 * MIN_TURN_S))
    take_turns([turn], 2)
    assert turn.cpu_seconds == pytest.approx(2 * turn.seconds)


def test_everyone_has_a_turn_in_each_round_in_an_order_that_changes(clock: Clock) -> None:
    made = [Turn(clock.call(name, 2 * MIN_TURN_S)) for name in "abc"]
    take_turns(made, 8)
    rounds = ["".join(clock.calls[start : start + 3]) for start in range(3, len(clock.calls), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"} and len(rounds) == 8
    assert len(set(rounds)) > 1 and [len(turn.times) for turn in made] == [8, 8, 8]


def test_short_calls_are_repeated_and_told_for_one(clock: Clock) -> None:
    turn = Turn(clock.call("short", MIN_TURN_S / 10))
    take_turns([turn], 2)
    assert len(clock.calls) == 2 + 2 * 10
    assert turn.times == pytest.approx([MIN_TURN_S / 10] * 2)


def test_call_that_takes_a_turn_by_itself_warms_up_once(clock: Clock) -> None:
    take_turns([Turn(clock.call("long", 3 * MIN_TURN_S))], 2)
    assert len(clock.calls) == 1 + 2


def test_rounds_are_counted_aloud(clock: Clock) -> None:
    seen: list[int] = []
    take_turns([Turn(clock.call("any", 1.0))], 3, lambda: seen.append(1))
    assert len(seen) == 3
