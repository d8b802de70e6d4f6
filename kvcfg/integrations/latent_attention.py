"""Layers with a latent (MLA): attention over latents as they are stored, without expanding them to keys and values.

A head's keys and values are linear in the latent c that all heads share, and a part r of the key is shared and rotated:

    score     q · (K c, r) = (Kᵀ q_nope, q_rot) · (c, r)
    output    sum of w * (V c) = V (sum of w * c)

so queries go into the latent's space and outputs come back from it (absorption, as DeepSeek-V2's paper describes it),
and the cache is read like one KV head. Layers of transformers expand latents in a method of their own, `expand_kv`;
once a model was handed over, it leaves latents that lie in pages as they are, for the attention `kvcfg` to take or to
expand.
"""

from __future__ import annotations

from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcfg.attention import Reach, attend
from kvcfg.cache.view import LayerView
from kvcfg.integrations.lazy_tensors import LazyTensor
from kvcfg.integrations.paged_states import NewStates, PagedStates, UnstoredStates

_ABSORBS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class LatentStates(LazyTensor):
    """Keys or values `[batch_size, n_q_heads, num_tokens, dim]`, expanded from latents once they are touched."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        side: int,
        expand: Any,
        latents: PagedStates | UnstoredStates,
        rotated: PagedStates | UnstoredStates,
    ) -> None:
        self._side, self._expand, self._latents, self._rotated = side, expand, latents, rotated

    @property
    def pages(self) -> LayerView | None:
        """What the step's queries may read; None if it is not stored yet."""
        return self._latents.pages if isinstance(self._latents, PagedStates) else None

    @property
    def unstored(self) -> NewStates | None:
        """The step's tokens, if they are not stored yet."""
        return self._latents.unstored if isinstance(self._latents, UnstoredStates) else None

    def read(self) -> Tensor:
        """All tokens, gathered and expanded."""
        expanded: tuple[Tensor, Tensor] = self._expand(self._latents.read(), self._rotated.read())
        return expanded[self._side]


def hand_latents_on(model: Any) -> None:
    """Let a model's layers hand on latents that lie in pages; it computes what it did with all others."""
    for kind in {type(module) for module in model.modules() if hasattr(module, "expand_kv")}:
        if not hasattr(kind.expand_kv, "hands_latents_on"):
            kind.expand_kv = _lazily(kind.expand_kv)


def absorbs(module: Any, query: Tensor) -> bool:
    """Whether a layer's attention can be computed among latents: its expansion is the plain linear one.

    Args:
        module: the layer.
        query: `[batch_size, n_q_heads, num_queries, qk_head_dim]`, of whatever numbers.
    """
    if module not in _ABSORBS:
        with torch.no_grad():
            _ABSORBS[module] = _expands_plainly(module, query)
    return _ABSORBS[module]


def _expands_plainly(module: Any, query: Tensor) -> bool:
    project = getattr(module, "kv_b_proj", None)
    if type(project) is not torch.nn.Linear or project.bias is not None:
        return False
    keys, values = _projections(module)
    latent = torch.linspace(-1, 1, keys.shape[2]).to(query).view(1, 1, 1, -1)
    rotated = query[:1, :1, :1, keys.shape[1] :]
    expanded = module.expand_kv(latent, rotated)
    expected = (
        torch.cat([_into(latent, keys.mT), rotated.expand(1, len(keys), 1, -1)], dim=-1),
        _into(latent, values.mT),
    )
    return all(torch.allclose(*pair, rtol=1e-2, atol=1e-3) for pair in zip(expanded, expected, strict=True))


def attend_latents(module: Any, query: Tensor, pages: LayerView, reach: Reach, scale: float) -> Tensor:
    """Attention of a layer that `absorbs`.

    Args:
        module: the layer.
        query: `[batch_size, n_q_heads, num_queries, qk_head_dim]`, the part that is not rotated first.
        pages: of the layer's latents.
        reach: which tokens each query sees.
        scale: what scores are multiplied by.

    Returns:
        `[batch_size, num_queries, n_q_heads, v_head_dim]`.
    """
    keys, values = _projections(module)
    absorbed = torch.cat([_into(query[..., : keys.shape[1]], keys), query[..., keys.shape[1] :]], dim=-1)
    read = attend(absorbed.transpose(1, 2).flatten(0, 1), pages, reach, scale=scale)
    return _into(read.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2), values.mT).transpose(1, 2)


def _projections(module: Any) -> tuple[Tensor, Tensor]:
    """What expands latents, by head: `[n_q_heads, qk_nope_head_dim, rank]` and `[n_q_heads, v_head_dim, rank]`."""
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    weight: Tensor = module.kv_b_proj.weight
    keys, values = weight.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
    return keys, values


def _into(states: Tensor, projection: Tensor) -> Tensor:
    """States `[batch_size, n_heads, num_tokens, a]` times a head's `[n_heads, a, b]`."""
    return states @ projection


def _lazily(expand: Any) -> Any:
    @wraps(expand)
    def expand_kv(module: Any, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        if not (
            isinstance(latents, PagedStates | UnstoredStates) and isinstance(rotated, PagedStates | UnstoredStates)
        ):
            plain: tuple[Tensor, Tensor] = expand(module, latents, rotated)
            return plain
        batch_size, _, num_tokens, _ = latents.shape
        n_heads = module.kv_b_proj.weight.shape[0] // (module.qk_nope_head_dim + module.v_head_dim)
        key_dim = module.qk_nope_head_dim + rotated.shape[3]
        kind = (latents.dtype, latents.device)
        origin = (expand.__get__(module), latents, rotated)
        return (
            LatentStates((batch_size, n_heads, num_tokens, key_dim), *kind, 0, *origin),
            LatentStates((batch_size, n_heads, num_tokens, module.v_head_dim), *kind, 1, *origin),
        )

    expand_kv.hands_latents_on = True  # type: ignore[attr-defined]
    return expand_kv
