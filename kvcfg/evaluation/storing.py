"""What a cache's format does to keys and values by itself: each layer and head of one window, before and after.

Every layer gets the keys and values that the model computes at full precision, so what goes wrong in one layer is not
counted again in those behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcfg.cache.paged import PagedKVCache
from kvcfg.cache.storage import KeysValues
from kvcfg.evaluation.quality import as_fed, full_precision
from kvcfg.integrations.transformers import TransformersCache
from kvcfg.results.stored_error import Heads, StoredError


@torch.no_grad()
def stored_error(model: Any, window: Tensor, cache: TransformersCache) -> StoredError:
    """Store a window's keys and values, and compare what is read back with them.

    Args:
        model: a causal language model of transformers.
        window: `[window_tokens]` int64.
        cache: an empty one with room for the window and one token more. Layers with a window of their own are
            compared over what their next query sees, and formats that close full pages over these, if there are any.
    """
    computed = full_precision(1)
    model(window[None].to(model.device), past_key_values=computed, use_cache=True, logits_to_keep=1)
    pages = cache.pages
    given = {
        layer: _as_stored(computed.layers[layer], pages.keeps_latents(layer))
        for layer, place in enumerate(pages.layers)
        if place is not None
    }
    stored: dict[int, KeysValues] = {}
    for (span,) in as_fed(torch.arange(len(window))[None], cache):
        for layer, (keys, values) in given.items():
            stored[layer] = pages.append(layer, keys[:, :, span], values[:, :, span])
    if cache.step_tokens is not None:
        # One token more closes the last page that is full.
        for layer, (keys, values) in given.items():
            keys, values = pages.append(layer, keys[:, :, :1], values[:, :, :1])
            stored[layer] = KeysValues(keys[:, :, :-1], values[:, :, :-1])
    judged = {layer: _num_judged(pages, layer, len(window)) for layer in given}
    errors: list[Heads] = []
    for side in range(2):
        by_layer = {layer: _by_head(given[layer][side], stored[layer][side], judged[layer]) for layer in given}
        errors.append([by_layer.get(layer, []) for layer in range(len(pages.layers))])
    return StoredError(keys=errors[0], values=errors[1])


def _num_judged(pages: PagedKVCache, layer: int, num_tokens: int) -> int:
    """Tokens in pages that are closed by now, where there are any and the layer closes pages; else all."""
    place = pages.layers[layer]
    assert place is not None
    closed = num_tokens // pages.params.page_size * pages.params.page_size
    return closed if closed and pages.params.params[place[0]].closes_pages else num_tokens


def _as_stored(layer: Any, is_latent: bool) -> KeysValues:
    """Keys and values of a layer; the latent and the rotated part of its key lie in one row, which has no value."""
    if not is_latent:
        return KeysValues(layer.keys, layer.values)
    rows = torch.cat([layer.keys, layer.values], dim=-1)
    return KeysValues(rows, rows[..., :0])


def _by_head(given: Tensor, stored: Tensor, judged: int) -> list[float | None]:
    """Relative error of `[1, n_kv_heads, length, dim]` by head, over what is left at the end of `judged` tokens."""
    first = given.shape[2] - stored.shape[2]
    given, stored = given[0, :, first:judged], stored[0, :, : max(0, judged - first)]
    given, stored = given.double().flatten(1), stored.double().flatten(1)
    sizes, errors = given.norm(dim=1).tolist(), (stored - given).norm(dim=1).tolist()
    return [error / size if size else None for error, size in zip(errors, sizes, strict=True)]
