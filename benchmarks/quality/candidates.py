"""What is measured: every recipe of conf/quantization, some more that kvcfg can be told, and full precision itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import kvcfg
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.presets import preset_values
from kvcfg.evaluation.quality import full_precision
from kvcfg.integrations.calibration_files import calibration_sha

Kind = Literal["recipe", "experimental", "peer", "floor"]

FED_TOKENS = 64
"""Tokens that caches of other libraries are given at a time."""

PUBLISHED = {
    "turboquant4": {"key_format": "gauss4", "value_format": "gauss4", "transform": "hadamard"},
    "turboquant3": {"key_format": "gauss3", "value_format": "gauss3", "transform": "hadamard"},
    "turboquant2": {"key_format": "gauss2", "value_format": "gauss2", "transform": "hadamard"},
    "oscar4": {"key_format": "uint4", "value_format": "uint4", "transform": "balanced", "balance_rope": "null"},
    "oscar2": {"key_format": "uint2", "value_format": "uint2", "transform": "balanced", "balance_rope": "null"},
    "kivi4": {"key_format": "uint4", "value_format": "uint4", "key_granularity": "channel"},
    "kivi2": {"key_format": "uint2", "value_format": "uint2", "key_granularity": "channel"},
    "nvfp4": {
        "key_format": "float4_e2m1fn",
        "value_format": "float4_e2m1fn",
        "granularity": "block",
        "quantization_granularity": "16",
        "scale_dtype": "float8_e4m3fn",
    },
    "mxfp4": {
        "key_format": "float4_e2m1fn",
        "value_format": "float4_e2m1fn",
        "granularity": "block",
        "quantization_granularity": "32",
        "scale_dtype": "float8_e8m0fnu",
    },
}
"""Published methods as near as kvcfg's axes come to them, in its pages: an int8 open page in place of fresh tokens."""

_AS_PUBLISHED = {
    "granularity": "token_head",
    "scale_dtype": "float16",
    "transform": "none",
    "balance_rope": "false",
    "experimental": "true",
}


@dataclass(frozen=True, slots=True)
class Costs:
    """What a cache took for one window.

    Attributes:
        bits: of one number that is stored as the candidate means to store it: scales, zeros, means, sinks counted.
        bits_effective: of one number of the whole window, the newest tokens included.
        clip_rate: share of the numbers that were cut off because scales do not follow them.
        note: what must be known to read the figures.
    """

    bits: float
    bits_effective: float
    clip_rate: float = 0.0
    note: str = ""


class Running(Protocol):
    """A candidate with all that it needs, ready for one window after the other."""

    model: Any

    def __call__(self, batch_size: int) -> Any:
        """An empty cache."""

    def costs(self) -> Costs:
        """What the last window took; the cache is emptied."""


class Models(Protocol):
    """Loads the model of an experiment, or gives the one that is loaded already."""

    def of(self, experiment: ExperimentConfig) -> Any:
        """A causal language model of transformers."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to keep keys and values.

    Attributes:
        name: what the table calls it.
        kind: recipe (of conf/quantization), experimental, peer or floor.
        page_size: tokens of a page; of a peer, tokens that it is given at a time.
        described: all that decides its figures besides model and text.
        start: makes it ready; may raise where something is missing.
    """

    name: str
    kind: Kind
    page_size: int
    described: Mapping[str, Any]
    start: Callable[[Models], Running] = field(repr=False)


def recipes(model: str, page_size: int, window_tokens: int, batch_size: int = 1) -> list[Candidate]:
    """Every recipe of conf/quantization and the published ones, at one page size."""
    names = [name for name in preset_values("quantization") if name not in ("default", "auto")]
    asked = {name: ("recipe", [f"quantization={name}"]) for name in names}
    for name, settings in PUBLISHED.items():
        values = (_AS_PUBLISHED | settings).items()
        asked[name] = ("experimental", [f"quantization.{key}={value}" for key, value in values])
    return [
        _candidate(name, kind, experiment_of(model, page_size, window_tokens, overrides, batch_size))
        for name, (kind, overrides) in asked.items()
    ]


def experiment_of(
    model: str, page_size: int, window_tokens: int, overrides: list[str], batch_size: int = 1
) -> ExperimentConfig:
    """An experiment whose cache holds one window, or a batch of them."""
    sizes = [f"workload.max_batch_size={batch_size}", f"workload.max_seq_len={window_tokens}"]
    pages = f"cache.kv_cache_page_size={page_size}"
    return kvcfg.compose([f"model={model}", "devices=cpu", *sizes, pages, *overrides])


def full_precision_by_page(model: str, window_tokens: int) -> Candidate:
    """The reference again, fed in pieces: its distance from itself is the noise floor."""
    experiment = experiment_of(model, FED_TOKENS, window_tokens, [])
    described = {"cache": "DynamicCache", "fed": FED_TOKENS}
    return Candidate("floor", "floor", FED_TOKENS, described, lambda models: FullPrecision(models.of(experiment)))


def _candidate(name: str, kind: Kind, experiment: ExperimentConfig) -> Candidate:
    said = experiment.model_dump(mode="json", include={"quantization", "cache"})
    described = {**said, "kvcfg": kvcfg.__version__, "calibration": calibration_sha(experiment)}
    page_size = experiment.cache.kv_cache_page_size
    return Candidate(name, kind, page_size, described, lambda models: Paged(experiment, models.of(experiment)))


class Paged:
    """kvcfg's own cache; its pages are allocated once."""

    def __init__(self, experiment: ExperimentConfig, model: Any) -> None:
        self.model = model
        self.pages = kvcfg.build(experiment, model)
        layers = self.pages.params.params
        self.numbers_per_token = sum(
            group.num_layers * group.n_kv_heads * (group.head_dim + group.value_dim) for group in layers
        )

    def __call__(self, batch_size: int) -> Any:
        self.pages.release()
        return kvcfg.TransformersCache(self.pages)

    def costs(self) -> Costs:
        pages = self.pages
        tokens = max(pages.length(layer) for layer in range(len(pages.layers)))
        costs = Costs(
            bits=8 * pages.params.bytes_per_token / self.numbers_per_token,
            bits_effective=8 * pages.bytes_in_use / (self.numbers_per_token * tokens),
            clip_rate=pages.clip_rate,
        )
        pages.release()
        return costs


class FullPrecision:
    """transformers' DynamicCache, fed in pieces."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, batch_size: int) -> Any:
        cache = full_precision(batch_size)
        cache.step_tokens = FED_TOKENS
        return cache

    def costs(self) -> Costs:
        return Costs(bits=32.0, bits_effective=32.0)
