"""The generation benchmark: what was asked is not asked again, and its tables say what the answers say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

Script = Callable[[str], ModuleType]


class Trial:
    """Two prompts; every reference is kept count of."""

    task, new_tokens = "divergence", 8

    def __init__(self, first: int) -> None:
        self.prompts = torch.tensor([[first, 1, 2], [first, 3, 4]])
        self.references = 0

    def reference(self, model: Any) -> str:
        self.references += 1
        return "reference"

    def outcomes(self, running: Any, reference: str) -> list[dict[str, float]]:
        assert reference == "reference"
        return [{"tokens": running.tokens, "tied": False}, {"tokens": 8, "tied": False}]


class Candidate:
    """Diverges after so many tokens; None cannot be started."""

    kind, page_size, described = "recipe", 64, {}

    def __init__(self, name: str, tokens: int | None) -> None:
        self.name, self.tokens, self.starts = name, tokens, 0

    def start(self, models: Any) -> Any:
        self.starts += 1
        if self.tokens is None:
            raise ImportError("not here")
        return SimpleNamespace(tokens=self.tokens)


@pytest.fixture
def store(quality: Script, tmp_path: Path) -> Any:
    return quality("generation_answers").AnswerStore(tmp_path / "deep" / "answers.jsonl")


@pytest.fixture
def ask(quality: Script, store: Any) -> Callable[..., None]:
    """Asks candidates about trials, and keeps the answers."""

    def run(candidates: list[Candidate], trials: list[Trial]) -> None:
        published = quality("measuring").Task("smollm2-135m", [64], None, 1, 128)
        task = SimpleNamespace(model="smollm2-135m", experiment=published.experiment, candidates=lambda: candidates)
        quality("generation").ask_all(task, trials, SimpleNamespace(of=lambda experiment: None), store)

    return run


def test_full_precision_is_asked_once_for_all_candidates(ask: Callable[..., None]) -> None:
    trials = [Trial(1), Trial(2)]
    ask([Candidate("a", 4), Candidate("b", 2)], trials)
    assert [trial.references for trial in trials] == [1, 1]


def test_what_was_asked_is_not_asked_again(ask: Callable[..., None], store: Any) -> None:
    ask([Candidate("a", 4)], [Trial(1)])
    again, trials = Candidate("a", 4), [Trial(1), Trial(2)]
    ask([again], trials)
    assert [trial.references for trial in trials] == [0, 1]
    assert len(store.answers()) == 4


def test_a_batch_that_was_cut_off_is_asked_again_and_counts_once(ask: Callable[..., None], store: Any) -> None:
    ask([Candidate("a", 4)], [Trial(1)])
    store.path.write_bytes(store.path.read_bytes()[:-20])
    ask([Candidate("a", 4)], [Trial(1)])
    assert len(store.answers()) == 2


def test_another_number_of_new_tokens_is_another_question(ask: Callable[..., None], store: Any) -> None:
    longer = Trial(1)
    longer.new_tokens = 16
    ask([Candidate("a", 4)], [Trial(1)])
    ask([Candidate("a", 4)], [longer])
    assert len(store.answers()) == 4


def test_a_recipe_that_changed_and_changed_back_is_asked_anew(ask: Callable[..., None], store: Any) -> None:
    for described, tokens in (("then", 1), ("between", 2), ("then", 3)):
        candidate = Candidate("a", tokens)
        candidate.described = {"recipe": described}
        ask([candidate], [Trial(1)])
    assert [answer.outcome["tokens"] for answer in store.answers()] == [3, 8]


def test_a_candidate_that_fails_is_told_with_its_reason_and_spoils_no_other(
    quality: Script, ask: Callable[..., None], store: Any
) -> None:
    broken = Candidate("b", None)
    ask([broken, Candidate("a", 4)], [Trial(1), Trial(2)])
    text = quality("generation_answers").markdown(store.answers())
    assert broken.starts == 1
    assert "b: ImportError: not here" in text
    assert "| smollm2-135m | 64 | a | 3 | 4 |" in text


def test_a_failure_is_tried_again(ask: Callable[..., None], store: Any) -> None:
    ask([Candidate("a", None)], [Trial(1)])
    ask([Candidate("a", 4)], [Trial(1)])
    assert [answer.outcome["tokens"] for answer in store.answers()] == [4, 8]


def answer(quality: Script, prompt: str, candidate: str, outcome: dict[str, float], task: str = "divergence") -> Any:
    plain = {"model": "m", "page_size": 64, "identity": "now", "length": 512, "new_tokens": 8}
    return quality("generation_answers").Answer(candidate=candidate, task=task, prompt=prompt, outcome=outcome, **plain)


def test_the_table_of_divergences_has_the_longest_first_and_says_what_is_censored(quality: Script) -> None:
    answers = [
        answer(quality, "p", "bits2", {"tokens": 2, "tied": False}),
        answer(quality, "q", "bits2", {"tokens": 4, "tied": True}),
        answer(quality, "p", "bits8", {"tokens": 8, "tied": False}),
    ]
    lines = quality("generation_answers").markdown(answers).splitlines()
    assert lines[2] == "| m | 64 | bits8 | 512 | 1 | 100.0% | ≥ 8 | 8.0 of 8 | 8.0 to 8.0 | 0 |"
    assert lines[3] == "| m | 64 | bits2 | 512 | 2 | 0.0% | 3 | 3.0 of 8 | 2.0 to 4.0 | 1 |"


def test_the_table_of_passkeys_has_full_precision_beside_every_score(quality: Script) -> None:
    whole = {"exact": True, "digits": 1.0, "exact_reference": True, "digits_reference": 1.0}
    part = {"exact": False, "digits": 0.6, "exact_reference": False, "digits_reference": 0.8}
    answers = [answer(quality, name, "bits4", item, "passkey") for name, item in (("p", whole), ("q", part))]
    last = quality("generation_answers").markdown(answers).splitlines()[-1]
    assert last == "| m | 64 | bits4 | 512 | 2 | 50.0% | 50.0% | 80.0% | 90.0% |"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" 12345. The", 1.0),
        (" 12395.", 0.8),
        (" 123", 0.6),
        (" 123456", 1.0),
        (" not 92345, 12345", 0.8),
        (" the mill", 0.0),
    ],
)
def test_digits_are_counted_in_the_first_number(quality: Script, reply: str, expected: float) -> None:
    assert quality("generation_trials").digits_right(reply, "12345") == expected


def test_outcomes_of_passkeys_have_full_precision_beside_them(quality: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = quality("generation_trials")
    asked = [trials.RetrievalPrompt(torch.tensor([1, 2]), (key,)) for key in ("12345", "67890")]
    replies = {"paged": (" 12345.", " 67800"), "exact": (" 12345.", " 67890")}

    def retrieve(model: str, tokenizer: Any, task: Any, prompts: Any, cache: Any, batch_size: int) -> Any:
        shares = [
            float(reply.startswith(f" {item.answers[0]}")) for reply, item in zip(replies[model], asked, strict=True)
        ]
        return trials.Retrieval(replies[model], torch.tensor(shares))

    monkeypatch.setattr(trials, "retrieve", retrieve)
    trial = trials.Passkeys(asked, None)
    outcomes = trial.outcomes(SimpleNamespace(model="paged"), trial.reference("exact"))
    assert outcomes[0] == {"exact": True, "digits": 1.0, "exact_reference": True, "digits_reference": 1.0}
    assert outcomes[1] == {"exact": False, "digits": 0.8, "exact_reference": True, "digits_reference": 1.0}
