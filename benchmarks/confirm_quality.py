"""Confirm kvcfg's quality figures with transformers alone: another cache, another KL.

    python benchmarks/confirm_quality.py [OVERRIDES…]

For float32, bfloat16 and int8 the same text is run through a DynamicCache that rounds keys and values itself,
and KL, perplexity and agreement are computed with torch's own functions. They are printed beside
`kvcfg.evaluate`, and the exit code is 1 if they differ by more than rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache

import kvcfg
from kvcfg.evaluation.text import text_windows

ROUNDING = {"kl": 1e-3, "ppl": 1e-5, "top1": 1e-3}
"""Largest difference allowed: of KL and perplexity as a share, of agreement as it is."""


def int8(states: torch.Tensor) -> torch.Tensor:
    """Round to 127 steps of the largest number of each token and head."""
    step = states.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (states / step).round() * step


ROUNDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": lambda states: states,
    "bfloat16": lambda states: states.bfloat16().float(),
    "int8": int8,
}


class RoundingCache(DynamicCache):
    """A DynamicCache that keeps what a format would have kept."""

    def __init__(self, rounder: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.rounder = rounder

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Round, then store."""
        return super().update(self.rounder(key_states), self.rounder(value_states), layer_idx, *args, **kwargs)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, window: torch.Tensor, name: str) -> torch.Tensor:
    """`[window_tokens, vocabulary]` log-probabilities in float64."""
    logits: torch.Tensor = model(window[None], past_key_values=RoundingCache(ROUNDERS[name])).logits
    return logits[0].double().log_softmax(-1)


def confirm(name: str, overrides: list[str], model: torch.nn.Module, windows: torch.Tensor) -> bool:
    """Print both sides for one format; whether they agree."""
    kl, nll, same = [], [], []
    for window in windows:
        exact, rounded = (log_probabilities(model, window, item)[:-1] for item in ("float32", name))
        kl.append(kl_div(rounded, exact, log_target=True, reduction="none").sum(-1))
        nll.append(cross_entropy(rounded, window[1:], reduction="none"))
        same.append(exact.argmax(-1) == rounded.argmax(-1))
    own = {
        "kl": torch.cat(kl).mean().item(),
        "ppl": torch.cat(nll).mean().exp().item(),
        "top1": torch.cat(same).double().mean().item(),
    }
    row = kvcfg.evaluate(kvcfg.compose([*overrides, f"cache.kv_cache_format={name}"]), model)
    agree = True
    for key, figure in own.items():
        theirs = getattr(row, key)
        difference = abs(figure - theirs) / (1 if key == "top1" else max(figure, 1e-7))
        agree &= difference <= ROUNDING[key]
        print(f"{name:9} {key:5} transformers {figure:.6g}   kvcfg {theirs:.6g}   difference {difference:.1e}")
    return agree


def main() -> int:
    """Confirm every format and return the exit code."""
    overrides = sys.argv[1:]
    experiment = kvcfg.compose(overrides)
    model, tokenizer = kvcfg.load(experiment)
    # Both sides with torch's attention: the difference is the caches' alone.
    model.set_attn_implementation("sdpa")
    windows = text_windows(experiment.workload, tokenizer)
    return 0 if all([confirm(name, overrides, model, windows) for name in ROUNDERS]) else 1


if __name__ == "__main__":
    sys.exit(main())
