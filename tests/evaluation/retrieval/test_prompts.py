"""What is hidden stands where it was to stand, in a text of the length that was asked for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvcfg.evaluation.retrieval.prompts import NoRoomError, five_digits, hide, spread

TASK, QUESTION = "Find it.", " Where is it? It is"


def hidden_in(letters: Any, length: int, *hidden: tuple[float, str]) -> str:
    text: str = letters.decode(hide(letters, length, TASK, hidden, QUESTION, random.Random(0)).tolist())
    return text


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_sentence_is_at_its_depth(letters: Any, depth: float) -> None:
    before, _, after = hidden_in(letters, 4096, (depth, " Here.")).partition(" Here.")
    filler = len(before.partition(TASK)[2]), len(after.partition(QUESTION)[0])
    # To half a sentence, of which the longest has 39 characters.
    assert filler[0] == pytest.approx(depth * sum(filler), abs=20)


def test_sentences_keep_their_order(letters: Any) -> None:
    text = hidden_in(letters, 2048, (0.2, " One."), (0.2, " Two."), (0.9, " Three."))
    assert text.index(" One.") < text.index(" Two.") < text.index(" Three.")


def test_a_sentence_stands_between_whole_ones(letters: Any) -> None:
    before, _, after = hidden_in(letters, 777, (0.6, " Here.")).partition(" Here.")
    assert before.endswith(".")
    assert after.startswith((" The ", " A ", " Bread ", " Rain "))


def test_a_prompt_ends_with_the_question(letters: Any) -> None:
    assert hidden_in(letters, 500, (0.5, " Here.")).endswith(QUESTION)


def test_a_length_without_room_for_filler_is_refused_with_one_that_has_it(letters: Any) -> None:
    with pytest.raises(NoRoomError, match="a prompt of 20 tokens has no room") as caught:
        hidden_in(letters, 20, (0.5, " Here."))
    assert len(hidden_in(letters, caught.value.least, (0.5, " Here."))) == caught.value.least


@pytest.mark.parametrize("count", [1, 4, 7])
def test_depths_are_one_in_each_part(count: int) -> None:
    assert [int(depth * count) for depth in spread(count, random.Random(1))] == list(range(count))


def test_numbers_differ() -> None:
    numbers = five_digits(5000, random.Random(0))
    assert len(set(numbers)) == 5000 and {len(number) for number in numbers} == {5}
