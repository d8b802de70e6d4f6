"""The quantized caches that transformers ships, as they are, with the settings that it documents.

They are given one page at a time, as kvcfg's caches are: in one piece they would hand a whole window back as it came,
and lose nothing. Even so their newest tokens, up to 128, are read in full precision, and so is the first piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from candidates import FED_TOKENS, Candidate, Costs, Models, Running, experiment_of
from torch import Tensor

PEERS: dict[str, dict[str, Any]] = {
    "transformers fp8": {"backend": "fp8"},
    "quanto int4": {"backend": "quanto", "nbits": 4},
    "quanto int2": {"backend": "quanto", "nbits": 2},
    "hqq int8": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "hqq int4": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "hqq int2": {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
}

_PACKAGES = {"fp8": "transformers", "quanto": "optimum-quanto", "hqq": "hqq"}


def peers(model: str, window_tokens: int) -> list[Candidate]:
    """Every peer, installed or not."""
    experiment = experiment_of(model, FED_TOKENS, window_tokens, [])
    return [
        Candidate(
            name,
            "peer",
            FED_TOKENS,
            {**settings, "fed": FED_TOKENS, "version": _version(_PACKAGES[settings["backend"]])},
            partial(_start, experiment, settings),
        )
        for name, settings in PEERS.items()
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _start(experiment: Any, settings: dict[str, Any], models: Models) -> Running:
    return Quantized(models.of(experiment), settings)


class Quantized:
    """transformers' QuantizedCache; it is made anew for every window."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.model, self.settings = model, settings
        self.cache = self(1)

    def __call__(self, batch_size: int) -> Any:
        from transformers import QuantizedCache

        self.cache = QuantizedCache(config=self.model.config, **self.settings)
        self.cache.step_tokens = FED_TOKENS
        return self.cache

    def costs(self) -> Costs:
        """Bits as they lie in memory: what is not quantized is in the model's dtype, which is float32 here."""
        layers = self.cache.layers
        stored = [part for layer in layers for part in _tensors([layer._quantized_keys, layer._quantized_values])]
        newest = [part for layer in layers for part in (layer.keys, layer.values)]
        layer = layers[0]
        num_newest = layer.keys.shape[-2] if layer.keys.numel() else 0
        text = self.model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * len(layers) * text.num_key_value_heads * head_dim
        old, tokens = layer.get_seq_length() - num_newest, layer.get_seq_length()
        costs = Costs(
            bits=8 * _nbytes(stored) / (per_token * old),
            bits_effective=8 * _nbytes(stored + newest) / (per_token * tokens),
            note=_note(num_newest, _nbytes(stored, half=True), _nbytes(stored + newest, half=True), per_token, tokens),
        )
        self(1)
        return costs


def _note(num_newest: int, stored: int, held: int, per_token: int, tokens: int) -> str:
    if not num_newest:
        return f"one scale for all, set by the first {FED_TOKENS} tokens"
    bits, effective = 8 * stored / (per_token * (tokens - num_newest)), 8 * held / (per_token * tokens)
    return (
        f"newest tokens, up to 128, read in full precision; scales and those tokens take the model's dtype, float32 "
        f"here: in a 16-bit model {bits:.2f} bits, {effective:.2f} effective"
    )


def _tensors(held: Any) -> Iterator[Tensor]:
    """The plain tensors in what a backend keeps: containers, and tensors that are made of others."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            yield from _tensors([getattr(held, name) for name in held.__tensor_flatten__()[0]])
        else:
            yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for item in held:
            yield from _tensors(item)


def _nbytes(parts: list[Tensor], half: bool = False) -> int:
    """Bytes of tensors; `half` = with 16 bits in place of float32."""
    wide = 2 if half else 1
    return sum(part.nbytes // (wide if part.dtype == torch.float32 else 1) for part in parts)
