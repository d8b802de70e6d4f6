"""Keys and values of sequences of different lengths, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.cache.storage import Part


class Packed(NamedTuple):
    """Keys and values of several sequences, one after the other.

    Attributes:
        keys: `[sum(lengths), n_kv_heads, head_dim]`.
        values: `[sum(lengths), n_kv_heads, value_dim]`.
        lengths: tokens of each sequence.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]


def joined(parts: Sequence[Part]) -> Packed:
    """Per sequence its tokens of every part, in the order of the parts."""
    keys, values, lengths = list[Tensor](), list[Tensor](), list[int]()
    used = [0] * len(parts)
    for number in range(len(parts[0].spans)):
        length = 0
        for place, part in enumerate(parts):
            span = part.spans[number]
            seen = slice(used[place] + span.offset, used[place] + span.offset + span.length)
            keys.append(part.states.keys[seen])
            values.append(part.states.values[seen])
            used[place] += span.num_rows
            length += span.length
        lengths.append(length)
    return Packed(torch.cat(keys), torch.cat(values), tuple(lengths))
