"""Every task asks for what its text holds, and for nothing else."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from kvcfg.config.retrieval_tasks import RETRIEVAL_TASKS
from kvcfg.evaluation.retrieval.answers import share_right
from kvcfg.evaluation.retrieval.prompts import NoRoomError, RetrievalPrompt
from kvcfg.evaluation.retrieval.tasks import TASKS, retrieval_prompts

LENGTH = 2000
MANY = 10


def asked(letters: Any, task: str, length: int = LENGTH, **settings: Any) -> list[tuple[str, RetrievalPrompt]]:
    prompts = retrieval_prompts(task, letters, length, MANY, **settings)
    return [(letters.decode(prompt.tokens.tolist()), prompt) for prompt in prompts]


def test_tasks_are_those_that_the_config_knows() -> None:
    assert tuple(TASKS) == RETRIEVAL_TASKS


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_the_length_that_was_asked_for(letters: Any, task: str, length: int) -> None:
    assert {len(text) for text, _ in asked(letters, task, length)} == {length}


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_only_there(letters: Any, task: str) -> None:
    assert {text.rindex(chr(1)) for text, _ in asked(letters, task)} == {0}


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_same_for_a_seed_and_others_for_another(letters: Any, task: str) -> None:
    first, again, other = ([text for text, _ in asked(letters, task, seed=seed)] for seed in (0, 0, 1))
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_of_a_task_differ(letters: Any, task: str) -> None:
    assert len({text for text, _ in asked(letters, task)}) == MANY


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_themselves_are_all_right(letters: Any, task: str) -> None:
    for _, prompt in asked(letters, task):
        assert share_right(f" {', '.join(prompt.answers)}.", prompt.answers, TASKS[task].item) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_is_refused_with_one_that_has_it(letters: Any, task: str) -> None:
    with pytest.raises(NoRoomError) as caught:
        retrieval_prompts(task, letters, 50, 1)
    assert len(retrieval_prompts(task, letters, caught.value.least, 1)[0].tokens) == caught.value.least


@pytest.mark.parametrize("task", TASKS)
def test_the_tokens_of_an_answer_suffice_for_the_answers(letters: Any, task: str) -> None:
    """With a token for every digit and letter of a name, but one for each whole word."""
    for _, prompt in asked(letters, task):
        named = [item if task == "frequent_words" else list(item) for item in prompt.answers]
        tokens = sum(1 if isinstance(item, str) else len(item) for item in named)
        separators = 2 * len(prompt.answers)
        assert tokens + separators <= TASKS[task].answer_tokens


def test_the_needle_is_hidden_at_one_depth_after_the_other(letters: Any) -> None:
    places = [text.index("The pass key is") / LENGTH for text, _ in asked(letters, "needle")]
    assert places == sorted(places[:5]) + sorted(places[5:])
    assert places[0] < 0.3 and places[4] > 0.7


def test_only_the_key_that_is_asked_for_is_right(letters: Any) -> None:
    for text, prompt in asked(letters, "multi_key"):
        place = text.rpartition("The code of the ")[2].removesuffix(" is")
        codes = dict(re.findall(r"The code of the (\w+) is (\d+)\.", text))
        assert len(codes) == 4
        assert prompt.answers == (codes[place],)


def test_the_key_that_is_asked_for_is_early_and_late(letters: Any) -> None:
    places = [text.index(prompt.answers[0]) / LENGTH for text, prompt in asked(letters, "multi_key")]
    assert min(places) < 0.3 and max(places) > 0.7


def test_all_values_are_asked_for(letters: Any) -> None:
    for text, prompt in asked(letters, "multi_value"):
        assert re.findall(r"One code of the chest is (\d+)\.", text) == list(prompt.answers)
        assert len(prompt.answers) == 4


def test_variables_that_are_asked_for_are_those_that_hold_the_number(letters: Any) -> None:
    for text, prompt in asked(letters, "variables"):
        held: dict[str, str] = {}
        for name, source in re.findall(r" Let (\w+) = (\w+)\.", text.partition("are ABC, DEF.")[2]):
            held[name] = held.get(source, source)
        number = re.search(r"Which variables hold (\d+)", text)
        assert number and {name for name in held if held[name] == number.group(1)} == set(prompt.answers)
        assert Counter(held.values()).most_common()[-1][1] == 4


def test_the_most_frequent_words_are_asked_for_by_a_margin(letters: Any) -> None:
    for text, prompt in asked(letters, "frequent_words", 600):
        counts = Counter(re.findall(TASKS["frequent_words"].item, text))
        others = [count for word, count in counts.items() if word not in prompt.answers]
        assert min(counts[word] for word in prompt.answers) > max(others)
