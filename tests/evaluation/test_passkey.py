"""Passkey prompts are what was asked for, and answers are scored digit by digit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcfg.evaluation.passkey import DEPTHS, PasskeyPrompt, passkey_prompts, retrieve, score
from kvcfg.evaluation.quality import full_precision

pytest.importorskip("transformers")

BEGINNING = 1


class Letters:
    """A token a character, and one that begins a text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BEGINNING] * add_special_tokens + list(map(ord, text))}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("length", [200, 512, 1024, 4096])
def test_prompts_have_the_length_that_was_asked_for(length: int) -> None:
    prompts = passkey_prompts(Letters(), length, num_keys=3)
    assert [len(prompt.tokens) for prompt in prompts] == [length] * 3 * len(DEPTHS)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_key_is_at_its_depth(depth: float) -> None:
    (prompt,) = passkey_prompts(Letters(), 4096, num_keys=1, depths=[depth])
    text = Letters().decode(prompt.tokens.tolist())
    before, _, after = text.partition(f" The pass key is {prompt.key}. Remember it: {prompt.key} is the pass key.")
    filler = len(before.partition("in mind.")[2]), len(after.partition(" What is")[0])
    # To half a sentence, of which the longest has 39 characters.
    assert filler[0] == pytest.approx(depth * sum(filler), abs=20)


def test_the_key_stands_between_whole_sentences() -> None:
    for prompt in passkey_prompts(Letters(), 777, num_keys=20):
        before, _, after = Letters().decode(prompt.tokens.tolist()).partition(f" The pass key is {prompt.key}.")
        assert before.endswith(".")
        assert after.partition("is the pass key.")[2].startswith((" The ", " A ", " Bread ", " Rain ", " What "))


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_only_there() -> None:
    (prompt,) = passkey_prompts(Letters(), 1024, num_keys=1, depths=[0.5])
    assert (prompt.tokens == BEGINNING).nonzero().tolist() == [[0]]


def test_prompts_are_the_same_for_a_seed_and_others_for_another() -> None:
    first, again, other = (
        [prompt.tokens.tolist() for prompt in passkey_prompts(Letters(), 512, num_keys=2, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert not any(prompt in other for prompt in first)


def test_a_length_without_room_for_filler_is_refused_with_one_that_has_it() -> None:
    with pytest.raises(ValueError, match="take 171 or more"):
        passkey_prompts(Letters(), 100, num_keys=1)
    assert len(passkey_prompts(Letters(), 171, num_keys=1, depths=[0.5])[0].tokens) == 171


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" 12345. The", (True, 1.0)),
        (" 12395.", (False, 0.8)),
        (" 123", (False, 0.6)),
        (" 123456", (False, 1.0)),
        (" not 92345, 12345", (False, 0.8)),
        (" the mill", (False, 0.0)),
    ],
)
def test_scores_count_digits_of_the_first_number(answer: str, expected: tuple[bool, float]) -> None:
    assert score(answer, "12345") == expected


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
def test_every_answer_is_held_against_its_own_key(batch_size: int) -> None:
    prompts = [PasskeyPrompt(torch.tensor([1, 2, 3]), key, 0.5) for key in ("12345", "67890", "13579")]
    model = speller([" 12345. ", " 67800. ", " 1357, n"])
    got = retrieve(model, Letters(), prompts, full_precision, batch_size=batch_size)
    assert got.answers == (" 12345. ", " 67800. ", " 1357, n")
    assert got.exact.tolist() == [True, False, False]
    assert got.digits.tolist() == [1.0, 0.8, 0.8]
    assert got.right_digits == pytest.approx(13 / 15)
