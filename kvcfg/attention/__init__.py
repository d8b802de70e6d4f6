"""Attention over the paged cache.

    view = cache.write(layer, keys, values)                  a layer's new tokens are stored
    reach = causal(starts, counts)                           once a step
    output = attend(queries, view, reach, scale=head_dim**-0.5)

A backend is a function of the same arguments; `reference` is the truth, and the others must match it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from kvcfg.attention.reach import Reach, causal
from kvcfg.cache.view import LayerView
from kvcfg.errors import ShapeError
from kvcfg.registry import Registry

__all__ = ["BACKENDS", "Reach", "attend", "causal"]

BACKENDS = Registry(
    "backend",
    {
        "reference": "kvcfg.attention.reference:attend",
        "cpu": "kvcfg.attention.cpu:attend",
    },
)
"""Names of backends to the functions that attend."""


def attend(
    queries: Tensor,
    view: LayerView,
    reach: Reach,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of a step's queries over the tokens of one layer, once the step's own are stored.

    Args:
        queries: `[num_queries, n_q_heads, head_dim]`, any float dtype, one sequence after the other; of a shard's
            view the shard's heads. Keys are used as they are stored, so queries must be what the model multiplies
            them with, RoPE included; of a latent (MLA) queries are absorbed into its space.
        view: what the cache gives of the layer in this step.
        reach: which tokens each query sees.
        scale: what a product of query and key is multiplied by.
        softcap: scores become `softcap * tanh(score / softcap)`; None = they stay.
        sinks: `[n_q_heads]`, a logit of each head that takes part in the sum alone; None = none.
        backend: a name in `BACKENDS`; auto = the compiled one on CPUs, the reference elsewhere.

    Returns:
        `[num_queries, n_q_heads, value_dim]` in the dtype of `queries`; 0 where a query sees nothing.

    Raises:
        ConfigError: if there is no backend of that name.
        ShapeError: if the step needed the place of tokens that its queries see (`view.in_place`), or queries do not
            fit the pages.
    """
    if not view.in_place:
        raise ShapeError(
            "the step's new tokens took the place of some that its queries see, or its queries read different pages "
            "closed: read the layer with append, or give each sequence fewer tokens a step"
        )
    if backend == "auto":
        backend = "cpu" if queries.device.type == "cpu" else "reference"
    return _backend(backend)(queries, view, reach, scale=scale, softcap=softcap, sinks=sinks)


@cache
def _backend(name: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = BACKENDS.load(name)
    return function
