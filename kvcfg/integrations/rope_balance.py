"""RoPE-pair balancing: keys and the queries that read them made equally large, from the weights alone.

A scale shared by the channels of a head is set by the largest of them. In many models a few pairs of channels
are 10 to 100 times the rest in the keys and as much smaller in the queries, so the rest of the key is stored
with few of its bits. An error of equal size in all channels costs a score the sum of q^2, while the size of the
error follows the sum of k^2; with a factor s on keys and 1/s on queries their product is least (by Cauchy and
Schwarz) where both are alike in every pair:

    s = (energy of q / energy of k) ^ (1/4)

The energy of a pair is the mean square that its weights give it: rows and biases of the projection and, where a
norm follows, that norm's weight. Query heads that read the same KV head count by their mean, so that a head whose
queries are like its keys is left as it is, whatever the number of its readers.

Related: SmoothAttention (QServe, Lin et al. 2024), which balances by observed keys instead of weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcfg.integrations.rope_layers import RopeLayer, rope_layers


def balance_rope_pairs(model: Any) -> None:
    """Scale keys and queries of every layer, pair by pair, until both are equally large; in place.

    The model computes the same function, to rounding. Weights of 16 bits get factors that are powers of two,
    which round nothing. Doing it twice changes nothing more.

    Args:
        model: a causal language model of transformers.

    Raises:
        ShapeError: if it is not known where the model makes and rotates its keys; nothing was changed then.
    """
    for layer in rope_layers(model):
        layer.scale_keys(balancing_factors(layer))


def balancing_factors(layer: RopeLayer) -> Tensor:
    """Factors `[keys.scaled_heads, head_dim]`, float64, by which keys would be balanced against queries."""
    queries, keys = pair_energies(layer)
    usable = (queries > 0) & (keys > 0) & torch.isfinite(queries) & torch.isfinite(keys)
    factors = torch.where(usable, queries / keys, 1.0).pow(0.25)
    if layer.keys.dtype.itemsize < 4:
        factors = factors.log2().round().exp2()
    return factors[:, layer.pair_of]


def pair_energies(layer: RopeLayer) -> tuple[Tensor, Tensor]:
    """Mean squares of queries and of keys, each `[keys.scaled_heads, pairs]`, float64.

    Query heads count by their mean over those that share a factor, and so do KV heads behind one common norm.
    """
    count = layer.keys.scaled_heads
    queries, keys = (side.energy().unflatten(0, (count, -1)).mean(1) for side in (layer.queries, layer.keys))
    return _by_pair(queries, layer.pair_of), _by_pair(keys, layer.pair_of)


def _by_pair(energy: Tensor, pair_of: Tensor) -> Tensor:
    pairs = energy.new_zeros(len(energy), int(pair_of.max()) + 1)
    return pairs.index_add_(1, pair_of, energy)
