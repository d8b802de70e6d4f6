"""`TransformersCache`: the paged cache as transformers' `generate()` and `forward()` take it.

    cache = TransformersCache(kvcfg.build(experiment, model))
    model.generate(**inputs, past_key_values=cache)

Every sequence of a batch has a row of its own in the page tables, padding included, as transformers feeds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcfg.cache.building import check_connector, check_recipe
from kvcfg.cache.paged import PagedKVCache
from kvcfg.cache.view import LayerView
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.model import LayerGroup
from kvcfg.config.recipes import stored_layers
from kvcfg.errors import CapacityError, ShapeError
from kvcfg.integrations.calibrated_layers import calibrated_groups
from kvcfg.integrations.paged_attention import PagedStates
from kvcfg.planning import plan


class TransformersCache(Cache):
    """A cache of transformers over pages. `pages` is the cache it fills."""

    def __init__(self, pages: PagedKVCache) -> None:
        self.pages = pages
        super().__init__(layers=[_PagedLayer(pages, index) for index in range(len(pages.layers))])

    @property
    def step_tokens(self) -> int | None:
        """The most tokens, from the start of a page on, that the model may be given at a time; None = any number."""
        closes = any(group.closes_pages for group in self.pages.params.params)
        return self.pages.params.page_size if closes else None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every sequence; 0 drops none."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to drop as a negative number, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.pages.batch_size:
            self.pages.truncate(self.get_seq_length() + tokens_to_remove)

    def reset(self) -> None:
        """Forget all sequences; every page is free again."""
        self.pages.release()


class _PagedLayer(CacheLayerMixin):
    """One layer of the model; it holds nothing but its place."""

    is_compileable = False
    is_croppable = True

    def __init__(self, pages: PagedKVCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._pages, self._index = pages, index
        place = pages.layers[index]
        self.is_sliding = place is not None and not pages.params.params[place[0]].grows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: pages are allocated when the cache is built."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[batch_size, n_kv_heads, num_tokens, dim]`; return all that may be read.

        It stays in its pages as long as nothing but the attention `kvcfg` takes it.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ShapeError(
                "pages keep no gradients: run the cache under torch.no_grad(), or train with use_cache=False"
            )
        first = self._pages.visible_from(self._index)
        seen = self._pages.write(self._index, key_states, value_states)
        if isinstance(seen, LayerView):
            return PagedStates.pair(self._pages, seen, self._pages.length(self._index) - first, key_states)
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `update` will return for so many new tokens, and the position of the first."""
        first = self._pages.visible_from(self._index)
        return self._pages.length(self._index) + query_length - first, first

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self._pages.length(self._index)

    def get_max_length(self) -> int:
        """Longest sequence that the cache was built for."""
        return self._pages.max_seq_len

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beams share pages only once sequences can fork."""
        raise NotImplementedError("beam search on paged caches is not supported; use num_beams=1")


def build(experiment: ExperimentConfig, model: Any) -> PagedKVCache:
    """Allocate the planned cache for a model, on the model's device.

    Args:
        experiment: what to build; `kvcfg plan` shows the bytes.
        model: a causal language model of transformers; its layers must be those of the config.

    Raises:
        ConfigError: if the recipe is none that was measured, and `quantization.experimental` is false; or if it needs
            a calibration and there is none of this model.
        BackendUnavailable: if pages are to leave the device.
        CapacityError: if the plan does not fit in memory.
        ShapeError: if the model's layers are not those of the config.
    """
    planned = plan(experiment)
    if not planned.fits:
        raise CapacityError(str(planned.shortfall))
    check_connector(experiment)
    check_recipe(experiment)
    params = experiment.to_params()
    check_model(experiment, model)
    return PagedKVCache(
        params,
        num_pages=planned.num_pages,
        max_batch_size=planned.max_batch_size,
        max_seq_len=planned.max_seq_len,
        layers=layer_places([layers.group for layers in stored_layers(experiment)]),
        devices=[model.device] * params.tensor_parallel_degree,
        calibrated=calibrated_groups(experiment, model),
    )


def layer_places(groups: Sequence[LayerGroup]) -> list[tuple[int, int] | None]:
    """For every layer of the model: its storing group, counted without shared ones, and its place in it.

    Raises:
        ShapeError: if there are several groups and the config does not say which layers they hold.
    """
    places: dict[int, tuple[int, int] | None] = {}
    storing = 0
    for group in groups:
        if group.layers is None and len(groups) > 1:
            raise ShapeError("model.layer_groups must name the layers of each group to run the model, not only to plan")
        for place, layer in enumerate(group.layers or range(group.num_layers)):
            places[layer] = None if group.kind == "shared" else (storing, place)
        storing += group.kind != "shared"
    return [places[layer] for layer in range(len(places))]


def check_model(experiment: ExperimentConfig, model: Any) -> None:
    """Raise ShapeError unless a loaded model has the layers and query heads of the config."""
    config = model.config.get_text_config()
    found = (config.num_hidden_layers, config.num_attention_heads)
    planned = (experiment.model.num_layers, experiment.model.num_q_heads)
    if found != planned:
        raise ShapeError(
            f"the model has {found[0]} layers of {found[1]} query heads, model={experiment.model.name} says "
            f"{planned[0]} of {planned[1]}"
        )
