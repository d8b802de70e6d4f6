"""What generation.py found: a JSONL file with a line for each candidate and prompt, and the tables made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from candidates import Candidate
from generation_trials import Outcome, Trial
from parts import append_line, current, whole_lines

from kvcfg.evaluation.free_running import Divergence

_DIVERGENCE = ("model", "page", "cache", "prompt", "prompts", "same to the end", "median", "mean", "95 %", "ties")
_PASSKEY = ("model", "page", "cache", "length", "prompts", "keys found", "full precision", "digits", "full precision")
_NUM_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A line of the file.

    Attributes:
        model: its name.
        candidate: its name.
        page_size: tokens of a page.
        identity: digest of all that decides the outcome besides the prompt; older lines with another one are stale.
        task: divergence or passkey.
        length: tokens of the prompt.
        new_tokens: tokens that were to be generated.
        prompt: digest of its tokens.
        outcome: the figures, or why there are none.
    """

    model: str
    candidate: str
    page_size: int
    identity: str
    task: str
    length: int
    new_tokens: int
    prompt: str
    outcome: Outcome | str

    @property
    def key(self) -> tuple[str | int, ...]:
        """What makes two answers the same measurement."""
        return (*self.place, self.identity, self.prompt)

    @property
    def place(self) -> tuple[str, str, int, str, int, int]:
        """The row of a table that the answer belongs to."""
        return (self.model, self.candidate, self.page_size, self.task, self.length, self.new_tokens)


class AnswerStore:
    """Answers in a file. Lines are only ever added; of two with one key the later one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def answers(self) -> list[Answer]:
        """All answers that count."""
        lines = [Answer(**json.loads(line)) for line in whole_lines(self.path)]
        return list({answer.key: answer for answer in current(lines)}.values())

    def measured(self) -> set[tuple[str | int, ...]]:
        """Keys of what need not be measured again."""
        return {answer.key for answer in self.answers() if not isinstance(answer.outcome, str)}

    def append(self, answer: Answer) -> None:
        """Add an answer."""
        append_line(self.path, json.dumps(asdict(answer), separators=(",", ":")))


def blanks(trial: Trial, model: str, candidate: Candidate, identity: str) -> list[Answer]:
    """What is to be filled in of a trial: one answer a prompt, whose outcome is that there is none yet."""
    return [
        Answer(
            model=model,
            candidate=candidate.name,
            page_size=candidate.page_size,
            identity=identity,
            task=trial.task,
            length=len(prompt),
            new_tokens=trial.new_tokens,
            prompt=hashlib.sha256(prompt.numpy().tobytes()).hexdigest()[:16],
            outcome="not asked yet",
        )
        for prompt in trial.prompts
    ]


def markdown(answers: Sequence[Answer]) -> str:
    """A table of divergences, one of passkeys, and what could not be measured."""
    rows: dict[tuple[str, str, int, str, int, int], list[Outcome]] = {}
    for answer in answers:
        if not isinstance(answer.outcome, str):
            rows.setdefault(answer.place, []).append(answer.outcome)
    failures = {f"{answer.candidate}: {answer.outcome}" for answer in answers if isinstance(answer.outcome, str)}
    # Most tokens or digits first, each model, page size and length by itself.
    ordered = sorted(rows, key=lambda place: (place[0], place[2], place[4], place[5], -_rank(rows[place])))
    divergences = [_divergence(place, rows[place]) for place in ordered if place[3] == "divergence"]
    passkeys = [_passkey(place, rows[place]) for place in ordered if place[3] == "passkey"]
    parts = [_table(_DIVERGENCE, divergences), _table(_PASSKEY, passkeys)]
    if failures:
        parts.append("\n".join(["Without figures, on some prompts or on all:", "", *sorted(failures)]))
    return "\n\n".join(part for part in parts if part)


def _rank(outcomes: Sequence[Outcome]) -> float:
    return sum(outcome.get("tokens", outcome.get("digits", 0)) for outcome in outcomes) / len(outcomes)


def _divergence(place: tuple[str, str, int, str, int, int], outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    model, candidate, page_size, _, length, new_tokens = place
    tokens, tied = (torch.tensor([outcome[name] for outcome in outcomes]) for name in ("tokens", "tied"))
    found = Divergence(tokens, tied, new_tokens)
    low, high = found.mean_interval()
    median = f"≥ {new_tokens}" if found.median == new_tokens else f"{found.median:g}"
    counted = (f"{found.never:.1%}", median, f"{found.mean:.1f} of {new_tokens}", f"{low:.1f} to {high:.1f}")
    return (model, str(page_size), candidate, str(length), str(len(outcomes)), *counted, str(found.num_ties))


def _passkey(place: tuple[str, str, int, str, int, int], outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    model, candidate, page_size, _, length, _ = place
    names = ("exact", "exact_reference", "digits", "digits_reference")
    shares = (sum(outcome[name] for outcome in outcomes) / len(outcomes) for name in names)
    return (model, str(page_size), candidate, str(length), str(len(outcomes)), *(f"{share:.1%}" for share in shares))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    rules = ["---"] * _NUM_NAMES + ["---:"] * (len(header) - _NUM_NAMES)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))
