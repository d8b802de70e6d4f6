"""Moments of the keys that a model stores and of the queries that read them, layer by layer, from its own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcfg.config.model import LayerGroup
from kvcfg.config.recipes import layers_of
from kvcfg.errors import ShapeError
from kvcfg.integrations.attention_recorder import attention_recorded

LEADING_TOKENS = 8
"""First tokens of a window that are left out of moments: an attention sink among them would outweigh all others."""


@dataclass(slots=True)
class HeadMoments:
    """Sums over the tokens of one layer so far.

    Attributes:
        keys: `[n_kv_heads, head_dim, head_dim]` float64, second moments of keys less the mean of their page.
        queries: the same of the queries that read a head, over all of its group.
        key_amax, value_amax: `[n_kv_heads]` float64, largest magnitudes of any token.
    """

    keys: Tensor
    queries: Tensor
    key_amax: Tensor
    value_amax: Tensor


class MomentCollector:
    """Adds up moments of all layers that store keys of single heads.

    Args:
        groups: the layer groups of the model.
        page_size: tokens of a page.

    Attributes:
        layers: moments by the model's layer.
    """

    def __init__(self, groups: Sequence[LayerGroup], page_size: int) -> None:
        self.layers: dict[int, HeadMoments] = {}
        self._page_size = page_size
        self._storing = {
            layer: group
            for group in groups
            if group.kind in ("full", "sliding_window", "chunked")
            for layer in layers_of(group)
        }
        self._shared = {layer for group in groups if group.kind == "shared" for layer in layers_of(group)}
        self._keys: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(self, model: Any, window: Tensor) -> None:
        """Add one window `[window_tokens]` int64 of a causal language model of transformers.

        Raises:
            ShapeError: if its layers are not those of the groups, or do not show their keys.
        """
        decoder = model.get_decoder()
        self._keys = {}
        with attention_recorded(decoder, self._add):
            decoder(
                input_ids=window[None].to(model.device),
                past_key_values=DynamicCache(config=decoder.config),
                use_cache=True,
            )
        if missing := set(self._storing) - set(self._keys):
            raise ShapeError(
                f"layer {min(missing)} of this {decoder.config.model_type} model computes attention in a way of its "
                f"own, and does not show its keys"
            )
        self._keys = {}

    def _add(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        source = self._source_of(layer, keys)
        if source is None:
            return
        readers = queries[0].unflatten(0, (keys.shape[1], -1))[..., LEADING_TOKENS:, :].flatten(1, 2).double()
        moment = readers.mT @ readers
        if source != layer:
            self.layers[source].queries += moment
            return
        centred = less_page_means(keys[0].double(), self._page_size)
        new = HeadMoments(
            centred.mT @ centred, moment, *(item[0].double().abs().amax((1, 2)) for item in (keys, values))
        )
        known = self.layers.setdefault(layer, new)
        if known is not new:
            known.keys += new.keys
            known.queries += new.queries
            known.key_amax = known.key_amax.maximum(new.key_amax)
            known.value_amax = known.value_amax.maximum(new.value_amax)

    def _source_of(self, layer: int, keys: Tensor) -> int | None:
        """The layer whose stored keys these are; None for layers that keep something else."""
        if layer in self._shared:
            for source, stored in self._keys.items():
                if stored.data_ptr() == keys.data_ptr():
                    return source
            raise ShapeError(f"layer {layer} reads keys that none of the layers before it stored")
        if layer not in self._storing:
            return None
        group = self._storing[layer]
        found, planned = (keys.shape[1], keys.shape[3]), (group.n_kv_heads, group.head_dim)
        if found != planned:
            has = f"{found[0]} KV heads of width {found[1]}"
            raise ShapeError(f"layer {layer} has {has}, the config says {planned[0]} of {planned[1]}")
        self._keys[layer] = keys
        return layer


def less_page_means(keys: Tensor, page_size: int) -> Tensor:
    """Keys `[n_heads, tokens, dim]` less the mean of their page, without those that `LEADING_TOKENS` counts."""
    pages = torch.arange(LEADING_TOKENS, keys.shape[1], device=keys.device) // page_size
    kept = keys[:, LEADING_TOKENS:]
    counts = pages.bincount().clamp(min=1).to(keys.dtype)
    sums = keys.new_zeros(keys.shape[0], len(counts), keys.shape[2]).index_add_(1, pages, kept)
    return kept - (sums / counts[:, None])[:, pages]
