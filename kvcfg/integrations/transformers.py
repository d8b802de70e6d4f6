"""`TransformersCache`: the paged cache as transformers' `generate()` and `forward()` take it.

    cache = TransformersCache(kvcfg.build(experiment, model))
    model.generate(**inputs, past_key_values=cache)

Every sequence of a batch has a row of its own in the page tables, padding included, as transformers feeds it. What
moves sequences (beam search, crop, copies) moves them in all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

import kvcfg.integrations.paged_attention  # noqa: F401  models can be set to the attention `kvcfg`
from kvcfg.cache.building import check_connector, check_recipe
from kvcfg.cache.paged import PagedKVCache
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.model import LayerGroup
from kvcfg.config.recipes import stored_layers
from kvcfg.errors import CapacityError, ShapeError
from kvcfg.integrations.calibrated_layers import calibrated_groups
from kvcfg.integrations.latent_attention import hand_latents_on
from kvcfg.integrations.paged_states import NewStates
from kvcfg.integrations.untraced import untraced
from kvcfg.planning import plan


class TransformersCache(Cache):
    """A cache of transformers over pages. `pages` is the cache it fills."""

    def __init__(self, pages: PagedKVCache) -> None:
        self.pages = pages
        super().__init__(layers=[_PagedLayer(pages, index) for index in range(len(pages.layers))])

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersCache:
        """A cache with pages of its own, which goes on from the same tokens."""
        return TransformersCache(deepcopy(self.pages, memo))

    @property
    def step_tokens(self) -> int | None:
        """The most tokens, from the start of a page on, that read the same bytes; None = any number.

        Only the attention `kvcfg` can be given more of them at a time.
        """
        closes = any(group.closes_pages for group in self.pages.params.params)
        return self.pages.params.page_size if closes else None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every sequence; 0 drops none.

        Raises:
            ValueError: if the number is positive, or a window or closed pages cannot go back so far.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to drop as a negative number, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.pages.batch_size:
            self.pages.truncate(self.get_seq_length() + tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Be ready to take back drafts, as assisted decoding and prompt lookup do after every step."""
        self.pages.expect_drafts()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with other beams, which share the pages that are full; see `PagedKVCache.select`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, one copy beside the other."""
        if self.pages.batch_size:
            self.pages.select([row for row in range(self.pages.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences, by number `[n]`, negative ones counted from the end, or by a bool `[batch_size]`."""
        if self.pages.batch_size:
            self.pages.select(torch.arange(self.pages.batch_size)[indices.cpu()].tolist())

    def reset(self) -> None:
        """Forget all sequences; every page is free again."""
        self.pages.release()


class _PagedLayer(CacheLayerMixin):
    """One layer of the model; it holds nothing but its place. What moves sequences is asked of the cache."""

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

    @untraced
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[batch_size, n_kv_heads, num_tokens, dim]`; return all that may be read.

        They stay in their pages as long as nothing but the attention `kvcfg` takes them; see `NewStates`.
        """
        return NewStates(self._pages, self._index, key_states, value_states).store()

    @untraced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `update` will return for so many new tokens, and the position of the first."""
        first = self._pages.visible_from(self._index)
        return self._pages.length(self._index) + query_length - first, first

    @untraced
    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self._pages.length(self._index)

    def get_max_length(self) -> int:
        """Longest sequence that the cache was built for."""
        return self._pages.max_seq_len


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
    return PagedKVCache(**planned_pages(experiment, model))


def planned_pages(experiment: ExperimentConfig, model: Any) -> dict[str, Any]:
    """What the planned cache for a model is made of, once both are checked: the arguments of `PagedKVCache`."""
    planned = plan(experiment)
    if not planned.fits:
        raise CapacityError(str(planned.shortfall))
    check_connector(experiment)
    check_recipe(experiment)
    params = experiment.to_params()
    check_model(experiment, model)
    hand_latents_on(model)
    return dict(
        params=params,
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
