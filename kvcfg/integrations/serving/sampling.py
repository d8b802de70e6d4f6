"""Token ids as they are given, and from logits to the next one and its log-probability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def token_list(tokens: Iterable[int] | Tensor) -> list[int]:
    """Token ids of one sequence, from a list or a tensor `[num_tokens]` or `[1, num_tokens]`."""
    return [int(token) for token in (tokens.reshape(-1).tolist() if isinstance(tokens, Tensor) else tokens)]


def sampled(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """The next token: the most likely one at temperature 0, else drawn from `softmax(logits / temperature)`.

    Args:
        logits: `[vocabulary]`.
        temperature: 0 or above.
        generator: of this request alone, so that what is drawn does not depend on the others; None = torch's own.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, -1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def token_logprobs(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-probability of one token per row of logits `[num_tokens, vocabulary]`, in float32: `[num_tokens]`."""
    chosen = torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)
    return logits.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
