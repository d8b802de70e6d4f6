"""What attention should give: float64, one head at a time, from the numbers that are stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shapes import Shape
from torch import Tensor


def attention(queries: Tensor, keys: Tensor, values: Tensor, stops: Sequence[int], shape: Shape) -> Tensor:
    """Attention of some queries over one sequence.

    Args:
        queries: `[num_queries, n_q_heads, head_dim]`.
        keys: `[num_tokens, n_kv_heads, head_dim]`.
        values: the same.
        stops: how many of the tokens each query sees.
        shape: the heads.

    Returns:
        `[num_queries, n_q_heads, head_dim]` float64.
    """
    group = shape.n_q_heads // shape.n_kv_heads
    seen = torch.arange(len(keys)) < torch.tensor(stops).unsqueeze(1)
    heads = []
    for head in range(shape.n_q_heads):
        scores = queries[:, head].double() @ keys[:, head // group].double().T * shape.scale
        weights = scores.masked_fill_(~seen, -torch.inf).softmax(dim=-1)
        heads.append(weights @ values[:, head // group].double())
    return torch.stack(heads, dim=1)
