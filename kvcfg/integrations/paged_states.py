"""What a layer's `update` returns: keys and values that are read from their pages only where somebody looks at them.

    PagedStates      in pages, all that the step's queries may read
    UnstoredStates   the step goes on over the end of a page that closes, so its queries read different bytes: it is
                     stored piece by piece by an attention that gives each query its own, and by no other

Of a layer with a latent (MLA) keys stand for the latents and values for the rotated parts of keys, which is what such
layers of transformers store and get back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcfg.cache.paged import PagedKVCache
from kvcfg.cache.storage import KeysValues
from kvcfg.cache.view import LayerView
from kvcfg.integrations.lazy_tensors import LazyTensor
from kvcfg.integrations.untraced import untraced


class PagedStates(LazyTensor):
    """Keys or values `[batch_size, n_kv_heads, num_tokens, dim]` of a layer, in its pages until they are touched.

    Attributes:
        pages: what the step's queries may read, until the layer's next tokens are stored.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        pages: LayerView,
        gather: Callable[[], Tensor],
    ) -> None:
        self.pages = pages
        self._gather = gather

    @untraced
    def read(self) -> Tensor:
        """All tokens, gathered and decoded."""
        return self._gather()


class UnstoredStates(LazyTensor):
    """Keys or values `[batch_size, n_kv_heads, num_tokens, dim]` as they will be once the step's tokens are stored.

    Attributes:
        unstored: the step's tokens.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, unstored: NewStates) -> None:
        self.unstored = unstored

    def read(self) -> Tensor:
        """Refused: no tensor holds what each of the queries reads."""
        raise self.unstored.cache.refusal(self.unstored.pieces[0], self.unstored.keys.shape[2])


@dataclass(frozen=True)
class NewStates:
    """Keys and values of a step's tokens, as a layer hands them to its cache.

    Where gradients are asked for, new tokens are read as stored and pass them on as if they were not rounded (the
    straight-through estimator of Bengio et al., 2013); tokens of earlier steps pass none on.

    Attributes:
        cache: where they go.
        layer: index in the model.
        keys: `[batch_size, n_kv_heads, num_tokens, head_dim]`; of MLA the latents `[batch_size, 1, num_tokens, rank]`.
        values: `[batch_size, n_kv_heads, num_tokens, value_dim]`; of MLA the rotated parts of keys.
    """

    cache: PagedKVCache
    layer: int
    keys: Tensor
    values: Tensor

    def store(self) -> tuple[Tensor, Tensor]:
        """Store them; keys and values that their queries may read.

        Raises:
            CapacityError: if pages, rows or the length do not suffice; nothing was stored.
            ShapeError: if batch, tokens, heads or widths differ from what the cache was built or begun with.
        """
        num_past, num_new = self._num_past, self.keys.shape[2]
        if len(self.pieces) == 1:
            seen = self.cache.write(self.layer, *self._as_stored, value_dim=self._rank)
            return self._seen(seen, num_past, num_new)
        keys, values = (
            UnstoredStates((*side.shape[:2], num_past + num_new, side.shape[3]), side.dtype, side.device, self)
            for side in (self.keys, self.values)
        )
        return keys, values

    def store_in_pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Store them piece by piece: which tokens come next, and the keys and values that their queries may read."""
        num_past = self._num_past
        for span, seen in self.cache.write_in_pieces(self.layer, *self._as_stored, value_dim=self._rank):
            yield span, *self._seen(seen, num_past, span.stop)

    @cached_property
    def pieces(self) -> list[int]:
        """Numbers of tokens that read the same bytes."""
        return self.cache.pieces(self.layer, self.keys.shape[2])

    @property
    def _num_past(self) -> int:
        """Tokens before the step that its first query sees."""
        return self.cache.length(self.layer) - self.cache.visible_from(self.layer)

    @property
    def has_latents(self) -> bool:
        """Whether one latent is stored for each token (MLA) instead of keys and values."""
        return self.cache.keeps_latents(self.layer)

    @property
    def _rank(self) -> int | None:
        """Numbers of a latent; None where keys and values are stored."""
        return self.keys.shape[3] if self.has_latents else None

    @property
    def _passes_gradients(self) -> bool:
        return torch.is_grad_enabled() and (self.keys.requires_grad or self.values.requires_grad)

    @property
    def _as_stored(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys.detach(), self.values.detach()
        if self._rank is None:
            return keys, values
        return torch.cat([keys, values], dim=-1), values[..., :0]

    def _seen(self, seen: LayerView | KeysValues, num_past: int, num_new: int) -> tuple[Tensor, Tensor]:
        """What queries may read: tokens before the step, and the first `num_new` of its own."""
        if isinstance(seen, KeysValues):
            return self._plain(seen, num_new)
        gathered = _Gathered(lambda: self._plain(self.cache.read(seen, self.keys.dtype), num_new))
        if self._passes_gradients:
            return gathered.both
        keys, values = (
            PagedStates((*side.shape[:2], num_past + num_new, side.shape[3]), side.dtype, side.device, seen, gather)
            for side, gather in ((self.keys, lambda: gathered.both[0]), (self.values, lambda: gathered.both[1]))
        )
        return keys, values

    def _plain(self, stored: KeysValues, num_new: int) -> tuple[Tensor, Tensor]:
        """What is stored, as the layer gets it back."""
        keys, values = stored
        if self._rank is not None:
            keys, values = keys[..., : self._rank], keys[..., self._rank :]
        if not self._passes_gradients:
            return keys, values
        return _straight_through(keys, self.keys[:, :, :num_new]), _straight_through(
            values, self.values[:, :, :num_new]
        )


def _straight_through(stored: Tensor, new: Tensor) -> Tensor:
    """Stored tokens, of which the last pass gradients on to the new ones that they were made of."""
    past = stored.shape[2] - new.shape[2]
    return torch.cat([stored[:, :, :past], new + (stored[:, :, past:] - new).detach()], dim=2)


class _Gathered:
    """Keys and values that are gathered together, once one of them is asked for."""

    def __init__(self, gather: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._gather = gather

    @cached_property
    def both(self) -> tuple[Tensor, Tensor]:
        return self._gather()
