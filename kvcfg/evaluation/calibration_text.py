"""What is in a calibration, in words: of which model, and what its matrices are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from kvcfg.integrations.calibration import Calibration
from kvcfg.results.table import aligned
from kvcfg.units import ceil_div

_PARTS = 4
_HEADER = ("layers", "bits gained", "least head", "most", "score error", "largest key", "value")
_DB_PER_BIT = 20 * math.log10(2)
_NOTE = """\
Bits gained: by how much finer keys would have to be stored without the matrices (less the mean of their page, spread
by Hadamard) to disturb scores as little, on the text that was calibrated on; another text gains less."""


def calibration_summary(path: Path, calibration: Calibration) -> str:
    """Where a calibration is, what it is of, and by quarters of the layers what it is worth."""
    made = calibration.provenance
    balanced = "balanced" if made.balance_rope else "as the model has them"
    lines = [
        str(path),
        f"{made.model}, {made.num_tokens:,} tokens from token {made.first_token:,}, pages of {made.page_size}, "
        f"RoPE pairs {balanced}",
    ]
    known = [layer for layer, gain in enumerate(calibration.key_gains) if gain is not None]
    if not known:
        return "\n".join([*lines, "", "No layer keeps keys of single heads, so nothing was calibrated."])
    size = ceil_div(len(known), _PARTS)
    rows = [_row(calibration, known[start : start + size]) for start in range(0, len(known), size)]
    return "\n".join([*lines, "", *aligned([_HEADER, *rows], num_left=1), "", _NOTE])


def _row(calibration: Calibration, layers: list[int]) -> tuple[str, ...]:
    gains = _joined(calibration.key_gains[layer] for layer in layers)
    keys, values = (
        _joined(column[layer] for layer in layers) for column in (calibration.key_amax, calibration.value_amax)
    )
    return (
        f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0]),
        f"{gains.mean():.2f}",
        f"{gains.min():.2f}",
        f"{gains.max():.2f}",
        f"{-_DB_PER_BIT * gains.mean().item():+.1f} dB",
        f"{keys.max():.4g}",
        f"{values.max():.4g}",
    )


def _joined(parts: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])
