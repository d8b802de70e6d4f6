"""What was measured so far: a JSONL file with a line for each candidate on each window.

A run of hours may end at any time; the next one reads the file and goes on with what is not in it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One candidate on one window.

    Attributes:
        kl: `[num_predictions]` float32, KL(full precision || candidate) in nats.
        nll: mean negative log-likelihood of the text under the candidate.
        nll_reference: the same in full precision.
        top1: share of predictions whose most likely token is the same.
        bits: of one number as it is stored for good.
        bits_effective: of one number of the window, the newest tokens included.
        clip_rate: share of numbers cut off so far.
        note: what must be known to read the figures.
    """

    kl: NDArray[np.float32]
    nll: float
    nll_reference: float
    top1: float
    bits: float
    bits_effective: float
    clip_rate: float
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A line of the file.

    Attributes:
        model: its name.
        candidate: its name.
        kind: what sort of candidate.
        page_size: tokens of a page.
        identity: digest of all that decides the figures besides the text; older lines with another one are stale.
        text: name of the text.
        text_sha: sha256 of it.
        first_token: where the window starts.
        window_tokens: its length.
        outcome: the figures, or why there are none.
    """

    model: str
    candidate: str
    kind: str
    page_size: int
    identity: str
    text: str
    text_sha: str
    first_token: int
    window_tokens: int
    outcome: Figures | str

    @property
    def key(self) -> tuple[str | int, ...]:
        """What makes two parts the same measurement."""
        return (self.model, self.candidate, self.page_size, self.identity, *self.window)

    @property
    def window(self) -> tuple[str, int, int]:
        """Which text, from where, how long."""
        return (self.text_sha, self.first_token, self.window_tokens)

    def to_json(self) -> str:
        """The part as one line of JSON; numbers per prediction as base64 of little-endian float32."""
        data = asdict(self)
        if isinstance(self.outcome, str):
            data["outcome"] = {"failed": self.outcome}
        else:
            data["outcome"]["kl"] = base64.b64encode(self.outcome.kl.astype("<f4").tobytes()).decode()
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The part that a line holds."""
        data: dict[str, Any] = json.loads(line)
        outcome = data["outcome"]
        if "failed" in outcome:
            return cls(**{**data, "outcome": outcome["failed"]})
        kl = np.frombuffer(base64.b64decode(outcome["kl"]), dtype="<f4")
        return cls(**{**data, "outcome": Figures(**{**outcome, "kl": kl})})


class PartStore:
    """Parts in a file. Lines are only ever added; of two with one key the later one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def parts(self) -> list[Part]:
        """All parts that count, in the order in which they were added; lines that were cut off are left out."""
        found: dict[tuple[str | int, ...], Part] = {}
        for line in whole_lines(self.path):
            part = Part.from_json(line)
            found.pop(part.key, None)
            found[part.key] = part
        return list(found.values())

    def measured(self) -> set[tuple[str | int, ...]]:
        """Keys of what need not be measured again."""
        return {part.key for part in current(self.parts()) if isinstance(part.outcome, Figures)}

    def append(self, part: Part) -> None:
        """Add a part."""
        append_line(self.path, part.to_json())


def whole_lines(path: Path) -> list[str]:
    """JSON objects of a file, a line each, without lines that were cut off; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if line.startswith("{") and line.endswith("}")]


def append_line(path: Path, line: str) -> None:
    """Add a line; one before it that was cut off is ended, so that it spoils no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            broken = file.read() != b"\n"
            file.write(b"\n" if broken else b"")
        file.write(line.encode() + b"\n")


class Identified(Protocol):
    """A line of a file that is stale once a later one has another identity."""

    model: str
    candidate: str
    page_size: int
    identity: str


Line = TypeVar("Line", bound=Identified)


def current(parts: Iterable[Line]) -> list[Line]:
    """Parts without those of an earlier state of their candidate, as it was before its recipe or kvcfg changed."""
    parts = list(parts)
    newest = {(part.model, part.candidate, part.page_size): part.identity for part in parts}
    return [part for part in parts if newest[part.model, part.candidate, part.page_size] == part.identity]
