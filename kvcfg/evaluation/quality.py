"""What a cache loses: predictions with it against predictions with a full-precision cache, on the same text.

Every query reads what the cache stored, its own token included, so a format cannot hide behind a fresh copy
of its keys and values, and the result does not depend on how the text is fed. The full-precision cache is
transformers' own DynamicCache, in the same run. Its disagreement with itself, fed in another shape, is the
noise floor: a KL near it means "no difference that this run can see".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS_AT_ONCE = 128
_NEIGHBOURS = 32
_PIECE_TOKENS = 64
_RESAMPLES = 2000
_DEPTHS = 8

CacheMaker = Callable[[int], Any]
"""Makes an empty cache for a batch of so many sequences; transformers takes it as `past_key_values`."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Predictions of two runs compared, one number a prediction.

    Attributes:
        kl: `[num_predictions]` KL(reference || candidate) in nats.
        nll: `[num_predictions]` negative log-likelihood of the text under the candidate.
        nll_reference: the same under the reference.
        same_top1: `[num_predictions]` whether both find the same token most likely.
    """

    kl: Tensor
    nll: Tensor
    nll_reference: Tensor
    same_top1: Tensor

    @classmethod
    def join(cls, parts: list[Agreement]) -> Agreement:
        """Several windows, one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def kl_interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the mean KL, over blocks of 32 neighbouring predictions."""
        return mean_interval(torch.stack([block.mean() for block in torch.split(self.kl, _NEIGHBOURS)]), seed)

    def kl_by_depth(self, num_windows: int) -> list[float]:
        """Mean KL of up to 8 equal parts of the windows, over all windows of one length, the beginnings first."""
        by_position = self.kl.view(num_windows, -1).mean(dim=0)
        parts = by_position.tensor_split(min(_DEPTHS, len(by_position)))
        return [part.mean().item() for part in parts]


def mean_interval(values: Tensor, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `[num_values]` floats."""
    chooser = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (_RESAMPLES, len(values)), generator=chooser)
    low, high = values[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


@torch.no_grad()
def compare(model: Any, windows: Tensor, candidate: CacheMaker, on_window: Callable[[], None]) -> Agreement:
    """Run the model over windows with a full-precision cache and with the candidate's.

    Args:
        model: a causal language model of transformers.
        windows: `[num_windows, window_tokens]` int64.
        candidate: makes the cache to judge.
        on_window: called after each window.
    """
    parts = []
    for window in windows.unbind():
        reference = logits(model, window[None], full_precision)[0]
        parts.append(agreement(reference, logits(model, window[None], candidate)[0], window))
        on_window()
    return Agreement.join(parts)


@torch.no_grad()
def noise_floor(model: Any, window: Tensor) -> float:
    """Mean KL of the full-precision cache against itself, fed at once and 64 tokens at a time.

    Args:
        model: a causal language model of transformers.
        window: `[window_tokens]` int64.
    """
    at_once = logits(model, window[None], full_precision)[0]
    cache = full_precision(1)
    pieces = [logits(model, piece[None], lambda _: cache)[0] for piece in torch.split(window, _PIECE_TOKENS)]
    return agreement(at_once, torch.cat(pieces), window).kl.mean().item()


def full_precision(batch_size: int) -> Any:
    """An empty cache of transformers that keeps keys and values as the model computes them."""
    from transformers import DynamicCache

    return DynamicCache()


def logits(model: Any, tokens: Tensor, cache: CacheMaker) -> Tensor:
    """Logits `[batch_size, window_tokens, vocabulary]` of `tokens` `[batch_size, window_tokens]`."""
    held = cache(len(tokens))
    pieces = as_fed(tokens.to(model.device), held)
    return torch.cat([model(piece, past_key_values=held, use_cache=True).logits for piece in pieces], dim=1)


def as_fed(tokens: Tensor, cache: Any) -> tuple[Tensor, ...]:
    """Tokens `[batch_size, num_tokens]` in the pieces that an empty cache takes.

    One piece, or a page at a time for a cache whose queries read closed pages otherwise than open ones.
    """
    step_tokens: int = getattr(cache, "step_tokens", None) or tokens.shape[1]
    return torch.split(tokens, step_tokens, dim=1)


def agreement(reference: Tensor, candidate: Tensor, tokens: Tensor) -> Agreement:
    """Compare two runs over one window.

    Args:
        reference: `[window_tokens, vocabulary]` logits of the full-precision run.
        candidate: logits of the other run, same shape.
        tokens: `[window_tokens]` int64; every token but the first is a prediction that counts.
    """
    return Agreement.join(list(_agreement_of_rows(reference[:-1], candidate[:-1], tokens[1:].to(reference.device))))


def _agreement_of_rows(reference: Tensor, candidate: Tensor, targets: Tensor) -> Iterator[Agreement]:
    # In float64: a KL of 1e-9 is a difference of logarithms near 10. A few rows at a time: they are wide.
    for rows in range(0, len(targets), _ROWS_AT_ONCE):
        span = slice(rows, rows + _ROWS_AT_ONCE)
        p, q = (side[span].double().log_softmax(-1) for side in (reference, candidate))
        target = targets[span, None]
        yield Agreement(
            kl=(p.exp() * (p - q)).sum(-1).cpu(),
            nll=-q.gather(-1, target).squeeze(-1).cpu(),
            nll_reference=-p.gather(-1, target).squeeze(-1).cpu(),
            same_top1=(p.argmax(-1) == q.argmax(-1)).cpu(),
        )
