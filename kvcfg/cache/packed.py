"""Keys and values of sequences of different lengths, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcfg.cache.step import GroupStep
from kvcfg.cache.storage import KeysValues


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


def join_past(
    layout: GroupStep, num_tokens: Sequence[int], page_size: int, past: KeysValues, fresh: KeysValues
) -> Packed:
    """Per sequence the tokens it sees of its past, then its new ones."""
    keys, values, lengths = list[Tensor](), list[Tensor](), list[int]()
    read = used = 0
    for span, count in zip(layout.spans, num_tokens, strict=True):
        seen = slice(read + span.offset, read + span.offset + span.length)
        new = slice(used, used + count)
        keys += [past.keys[seen], fresh.keys[new]]
        values += [past.values[seen], fresh.values[new]]
        lengths.append(span.length + count)
        read, used = read + span.num_pages * page_size, used + count
    return Packed(torch.cat(keys), torch.cat(values), tuple(lengths))
