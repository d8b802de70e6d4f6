"""One request: what was asked for, what came of it so far, and its tokens as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvcfg.integrations.serving.engine import ServingEngine


class Finish(StrEnum):
    """Why a request has ended."""

    stop = "stop"
    length = "length"
    cancelled = "cancelled"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way through the engine; made by `ServingEngine.submit`.

    Iterating over it yields tokens as they are generated, and runs the engine while there are none.

    Attributes:
        number: order of submission.
        prompt: token ids.
        max_new_tokens: after so many it ends.
        temperature: logits are divided by it before one is drawn; 0 = the most likely token.
        stop_ids: tokens after which it ends.
        priority: higher ones run first.
        tokens: generated token ids, a stop token included.
        logprobs: of each of them the logarithm of its probability, as the model gave it (before temperature).
        finish: why it ended; None while it runs or waits.
        cached_tokens: tokens that were found in the prefix cache instead of computed, over all its runs.
        preemptions: how often its pages were taken away.
        submitted: seconds, when it came.
        first_token: seconds, when its first token was there; None before.
    """

    engine: ServingEngine = field(repr=False)
    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    stop_ids: frozenset[int]
    priority: int
    generator: torch.Generator | None = field(repr=False)
    submitted: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    first_token: float | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.prompt, *self.tokens]

    def span(self, start: int, stop: int) -> list[int]:
        """Some of these tokens, by position."""
        begin = len(self.prompt)
        return [*self.prompt[start:stop], *self.tokens[max(0, start - begin) : max(0, stop - begin)]]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def precedence(self) -> tuple[int, int]:
        """Requests with the smallest go first: high priority, then early submission."""
        return -self.priority, self.number

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from submission to the first token; None before it."""
        return None if self.first_token is None else self.first_token - self.submitted

    def __iter__(self) -> Iterator[int]:
        """Tokens from the first on, each as soon as it is there."""
        seen = 0
        while True:
            while seen < len(self.tokens):
                yield self.tokens[seen]
                seen += 1
            if self.finish is not None:
                return
            self.engine.step()

    def result(self) -> list[int]:
        """All generated tokens; runs the engine until the request has ended."""
        return list(self)

    def cancel(self) -> None:
        """End it now; its pages are free again."""
        self.engine.cancel(self)
