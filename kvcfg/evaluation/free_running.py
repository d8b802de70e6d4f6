"""What a cache loses when a model generates by itself: tokens until its answer first differs from full precision.

Both runs take the most likely token at every step, so nothing is left to chance. Predictions on a given text
(`quality.py`) put a run back on course after every token; here one token that differs changes all that follows, and
therefore only the first difference counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcfg.evaluation.quality import CacheMaker, as_fed, mean_interval

TIE = 1e-4
"""Two best logits nearer to each other than this may change places for rounding alone."""


class Choices(NamedTuple):
    """What a model found most likely: of every sequence at one step `[num_prompts]`, or at all `[num_prompts, steps]`.

    Attributes:
        tokens: int64, the most likely token.
        margins: its logit less that of the second.
    """

    tokens: Tensor
    margins: Tensor


@dataclass(frozen=True, slots=True)
class Divergence:
    """How long greedy answers stay those of the full-precision cache.

    Attributes:
        tokens: `[num_prompts]` int64, tokens before the first that differs; `num_new_tokens` if none does.
        tied: `[num_prompts]` whether the reference all but hesitated (`TIE`) between two tokens at that place, so
            that the difference says nothing about the cache.
        num_new_tokens: tokens that were generated.
    """

    tokens: Tensor
    tied: Tensor
    num_new_tokens: int

    @property
    def mean(self) -> float:
        """Mean of tokens; too low by what was not generated."""
        return self.tokens.double().mean().item()

    @property
    def median(self) -> float:
        """Median of tokens; where it is `num_new_tokens` the true one is that or more."""
        return self.tokens.double().quantile(0.5).item()

    @property
    def never(self) -> float:
        """Share of the prompts whose answer is the same to its end."""
        return (self.tokens == self.num_new_tokens).double().mean().item()

    @property
    def num_ties(self) -> int:
        """Differences that are ties."""
        return int(self.tied.sum())

    def mean_interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the mean, over prompts."""
        return mean_interval(self.tokens.double(), seed)


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, cache: CacheMaker) -> Iterator[Choices]:
    """Go on from prompts with the most likely token, without end; a token that ends texts is one like any other.

    Args:
        model: a causal language model of transformers.
        prompts: `[batch_size, prompt_tokens]` int64.
        cache: makes the cache; it holds `prompt_tokens`, and one more for every step but the first.
    """
    held = cache(len(prompts))
    *begun, piece = as_fed(prompts.to(model.device), held)
    for early in begun:
        model(early, past_key_values=held, use_cache=True, logits_to_keep=1)
    while True:
        logits = model(piece, past_key_values=held, use_cache=True, logits_to_keep=1).logits[:, -1]
        best = logits.float().topk(2)
        piece = best.indices[:, :1]
        yield Choices(piece[:, 0].cpu(), (best.values[:, 0] - best.values[:, 1]).cpu())


def continuation(
    model: Any, prompts: Tensor, cache: CacheMaker, num_new_tokens: int, *, batch_size: int = 8
) -> Choices:
    """Greedy answers to all prompts.

    Args:
        model: a causal language model of transformers.
        prompts: `[num_prompts, prompt_tokens]` int64.
        cache: makes the cache of a batch.
        num_new_tokens: tokens to generate.
        batch_size: prompts at a time.

    Returns:
        Tokens and margins `[num_prompts, num_new_tokens]`.
    """
    batches = []
    for batch in prompts.split(batch_size):
        steps = islice(greedy(model, batch, cache), num_new_tokens)
        batches.append([torch.stack(parts, dim=1) for parts in zip(*steps, strict=True)])
    return Choices(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def first_divergence(
    model: Any, prompts: Tensor, candidate: CacheMaker, reference: Choices, *, batch_size: int = 8
) -> Divergence:
    """Generate with the candidate's cache until every answer differs from the reference, or to its end.

    Args:
        model: a causal language model of transformers.
        prompts: `[num_prompts, prompt_tokens]` int64.
        candidate: makes the cache to judge.
        reference: `continuation` of the same prompts with `full_precision`.
        batch_size: prompts at a time.
    """
    num_new_tokens = reference.tokens.shape[1]
    batches = zip(prompts.split(batch_size), reference.tokens.split(batch_size), strict=True)
    tokens = torch.cat([_same_tokens(greedy(model, batch, candidate), expected) for batch, expected in batches])
    place = tokens.clamp(max=num_new_tokens - 1)[:, None]
    close = reference.margins.gather(1, place)[:, 0] < TIE
    return Divergence(tokens, close & (tokens < num_new_tokens), num_new_tokens)


def _same_tokens(steps: Iterator[Choices], expected: Tensor) -> Tensor:
    """Tokens of each row before the first that is not the expected one."""
    same = torch.ones(len(expected), dtype=torch.bool)
    count = torch.zeros(len(expected), dtype=torch.int64)
    # The expected ones first: at their end no further step is taken.
    for tokens, step in zip(expected.unbind(1), steps, strict=False):
        same &= step.tokens == tokens
        if not same.any():
            break
        count += same
    return count
