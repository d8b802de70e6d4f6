"""What storing the keys, or the values, of single layers in few bits costs a model.

Each side is stored alone in one format, while all other layers hold full numbers, and the model is run over a short
window. What other formats would cost follows from their squared error: as long as errors are small the KL divergence
grows with it, since it has a minimum where there is none. That layers differ in how much they bear, keys and values
too, is what KVTuner measures as well; costs that add up are the usual model of mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.quantization import LayerFormat
from kvcfg.config.recipes import layers_of, resolve_recipe
from kvcfg.evaluation.measure import sized_to_windows
from kvcfg.evaluation.quality import CacheMaker, agreement, full_precision, logits
from kvcfg.formats import FORMATS
from kvcfg.formats.codec import Codec
from kvcfg.integrations.transformers import TransformersCache, build
from kvcfg.planning.layer_formats import FOUND_FORMATS, Side, with_layers

PROBE_FORMAT = "gauss3"
_OTHER_SIDE = "int8"
_WIDE = "float32"
_NORMAL_TOKENS = 4096


def without_budget(experiment: ExperimentConfig) -> ExperimentConfig:
    """The same experiment with memory for whatever is measured."""
    cache = experiment.cache.model_copy(update={"kv_cache_memory_bytes": None})
    return experiment.model_copy(update={"cache": cache})


class Prober:
    """Runs a model over one window with different caches.

    Args:
        model: a causal language model of transformers.
        window: `[window_tokens]` int64.
        on_run: called after each run.
    """

    def __init__(self, model: Any, window: Tensor, on_run: Callable[[], None]) -> None:
        self._model, self._window, self._on_run = model, window, on_run
        self._reference = self._logits(full_precision)

    def kl(self, experiment: ExperimentConfig) -> float:
        """Mean KL divergence of an experiment's cache to the full-precision one, in nats."""
        pages = build(sized_to_windows(without_budget(experiment)), self._model)
        result = self._logits(lambda _: TransformersCache(pages))
        self._on_run()
        return agreement(self._reference, result, self._window).kl.mean().item()

    def kl_of_sides(self, start: ExperimentConfig, sides: Sequence[Side]) -> dict[Side, float]:
        """What each side costs alone in `PROBE_FORMAT`; the other side of its layer is in int8, which costs little.

        Args:
            start: the recipe of all pages (`starting_point`).
            sides: what to store in few bits, one by one.
        """
        return {side: self.kl(_probe(start, side)) for side in sides}

    @torch.no_grad()
    def _logits(self, cache: CacheMaker) -> Tensor:
        return logits(self._model, self._window[None], cache)[0]


def squared_errors(start: ExperimentConfig) -> dict[str, float]:
    """Mean squared error of each format on normal numbers, as the recipe scales them."""
    recipe, page_size = resolve_recipe(start), start.cache.kv_cache_page_size
    dim = next(group.head_dim for group in start.model.layer_groups if group.elements_per_token)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(max(1, _NORMAL_TOKENS // page_size), page_size, 1, dim, generator=generator)
    errors = {}
    for name in FOUND_FORMATS:
        side = replace(recipe.values, element_format=FORMATS[name], transform="none", sink_tokens=0)
        codec = Codec(side, 1, dim, page_size)
        errors[name] = (codec.decode(codec.encode(numbers), torch.float32) - numbers).square().mean().item()
    return errors


def _probe(start: ExperimentConfig, side: Side) -> ExperimentConfig:
    """One side in the probe's format; every other layer, and pages that are being filled, in full precision."""
    named = partial(LayerFormat, layers=(side.layer,))
    storing = [group for group in start.model.layer_groups if group.elements_per_token]
    wide = LayerFormat(layers=tuple(layer for group in storing for layer in layers_of(group)), format=_WIDE)
    formats = {"key": _OTHER_SIDE, "value": _OTHER_SIDE} | {side.what: PROBE_FORMAT}
    narrow = named(key_format=formats["key"], value_format=formats["value"])
    return with_layers(start, (wide, narrow), open_page_format=_WIDE, experimental=True)
