"""Every reply is held against the answers of its own prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcfg.evaluation.quality import full_precision
from kvcfg.evaluation.retrieval.answers import retrieve, share_right
from kvcfg.evaluation.retrieval.prompts import RetrievalPrompt
from kvcfg.evaluation.retrieval.tasks import TASKS

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" 12345. The", 1),
        (" 12395.", 0),
        (" 123", 0),
        (" 123456", 0),
        (" not 92345, 12345", 0),
        (" the mill", 0),
    ],
)
def test_only_the_first_number_counts_where_one_is_asked_for(reply: str, expected: float) -> None:
    assert share_right(reply, ["12345"], TASKS["needle"].item) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" horse, milk and snow.", 1),
        (" snow, horse, milk", 1),
        (" milk milk milk, snow, horse", 1),
        (" bell, milk, snow, horse", 2 / 3),
        (" snow, bell, lamp", 1 / 3),
        (" horses", 0),
    ],
)
def test_as_many_words_count_as_are_asked_for_in_any_order(reply: str, expected: float) -> None:
    assert share_right(reply, ["milk", "snow", "horse"], TASKS["frequent_words"].item) == expected


def test_names_of_the_example_do_not_count() -> None:
    assert share_right(" ABC, DEF, KPR, SMC", ["KPR", "SMC"], TASKS["variables"].item) == 1


def speller(answers: list[str]) -> Any:
    """A model that says one answer after the other, whatever it is asked."""
    said: list[str] = []
    rows = iter(answers)

    def forward(tokens: torch.Tensor, **options: Any) -> Any:
        if tokens.shape[1] > 1:
            said[:] = [next(rows) for _ in tokens]
        letters = [text[0] for text in said]
        said[:] = [text[1:] for text in said]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor(list(map(ord, letters))), 256)[:, None])

    forward.device = torch.device("cpu")  # type: ignore[attr-defined]
    return forward


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_reply_is_held_against_its_own_prompt(letters: Any, batch_size: int) -> None:
    prompts = [RetrievalPrompt(torch.tensor([1, 2, 3]), (key,)) for key in ("12345", "67890", "13579")]
    model = speller([" 12345. ", " 67800. ", " 13579, "])
    got = retrieve(model, letters, TASKS["needle"], prompts, full_precision, batch_size=batch_size)
    assert got.replies == (" 12345. ", " 67800. ", " 13579, ")
    assert got.right.tolist() == [1, 0, 1]
