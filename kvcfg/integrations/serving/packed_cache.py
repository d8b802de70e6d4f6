"""The cache engine as a cache of transformers, for a batch of sequences of different lengths in a single row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcfg.cache.manager import KVCacheManager
from kvcfg.cache.step import first_seen
from kvcfg.errors import ShapeError
from kvcfg.integrations.serving.packed_batch import PackedBatch
from kvcfg.integrations.serving.packed_states import GatheredTokens, PackedStates
from kvcfg.params import KVCacheParams


class PackedCache(Cache):
    """What a model is given as `past_key_values` in a step.

    Args:
        manager: the pages.
        places: for every layer of the model its group and its place in it; None for layers that store nothing.

    Attributes:
        batch: the step under way.

    Raises:
        ShapeError: if a layer keeps no keys and values that attention could read.
    """

    def __init__(self, manager: KVCacheManager, places: Sequence[tuple[int, int] | None]) -> None:
        for group in manager.params.params:
            if not group.stores_pages or group.is_mla:
                raise ShapeError(
                    f"continuous batching reads keys and values of heads; {group.kind} layers keep none. "
                    "Try: model.generate(…, past_key_values=kvcfg.TransformersCache(kvcfg.build(experiment, model)))"
                )
        self.manager = manager
        self.batch: PackedBatch | None = None
        firsts = [0, *accumulate(group.num_layers for group in manager.params.params)]
        numbers = [None if place is None else firsts[place[0]] + place[1] for place in places]
        pairs = zip(numbers, places, strict=True)
        super().__init__(layers=[_PackedLayer(self, number, place) for number, place in pairs])


class _PackedLayer(CacheLayerMixin):
    """One layer of the model; it holds nothing but its place."""

    is_compileable = False

    def __init__(self, cache: PackedCache, number: int | None, place: tuple[int, int] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._cache, self._number = cache, number
        self._group: KVCacheParams | None = None if place is None else cache.manager.params.params[place[0]]
        self.is_sliding = self._group is not None and not self._group.grows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: pages are allocated when the engine is built."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the step's keys and values `[1, n_kv_heads, num_rows, dim]`; rows after its tokens are ignored."""
        batch, manager, number, group = self._cache.batch, self._cache.manager, self._number, self._group
        if batch is None or number is None or group is None:
            raise ShapeError("a packed cache takes keys and values of a step that the engine has begun")
        step, count = batch.step, batch.num_tokens
        keys, values = (states[0, :, :count].transpose(0, 1) for states in (key_states, value_states))
        view = manager.layer_view(step, number)
        source: Any
        # Which page a window's new tokens take depends on other sequences, and so whether it can be read in place.
        if view.in_place and len(view.storage.shards) == 1 and not (batch.alone and group.window is not None):
            manager.write(step, number, keys, values)
            source = batch.seen_by_queries(view)
        else:
            firsts = [first_seen(group, start) for start in step.starts]
            source = GatheredTokens(manager.append(step, number, keys, values), firsts, batch)
        kind = (key_states.dtype, key_states.device, source, batch, group)
        return PackedStates(tuple(key_states.shape), *kind), PackedStates(tuple(value_states.shape), *kind)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if the rows were a sequence of their own: each of them knows what it sees, so no mask is read."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are given with every step."""
        return 0

    def get_max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self._cache.manager.max_seq_len
