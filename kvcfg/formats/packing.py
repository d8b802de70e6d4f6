"""Elements of 6 to 2 bits in whole bytes, and back by looking up several of them at once.

A row of elements is cut into groups whose low bits fill one byte. The bits above them, if any, follow in a
second plane.

    bits   a group is    low plane             high plane
    6      2 elements    4 bits of each        2 bits of each: 2 groups a byte
    5      2 elements    4 bits of each        1 bit of each:  4 groups a byte
    4      2 elements    4 bits of each
    3      4 elements    2 bits of each        1 bit of each:  2 groups a byte
    2      4 elements    2 bits of each

The first element of a group has its lowest bits. With n groups to a byte, byte j of a high plane of m bytes
holds groups j, m + j, 2m + j …, so that the plane is taken apart by shifting it as a whole.

Reading looks up a group, not an element: the low byte and the high bits together are an index of at most 12
bits into a table of every group's numbers, 2 float32 as one float64 or 4 as one complex128, which torch moves
as one item. That costs less than the arithmetic that would take its place, whatever the levels are.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Packing:
    """Packs elements of `bits` bits and looks them up again; rows are multiples of 8 elements."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._group = 2 if bits >= 4 else 4
        self._low_bits = 8 // self._group
        self._high_bits = bits - self._low_bits
        self._high_group_bits = self._high_bits * self._group

    def pack(self, codes: Tensor) -> Tensor:
        """Codes `[n, count]` uint8, each below 2**bits, to bytes `[n, count * bits / 8]`."""
        groups = codes.unflatten(-1, (codes.shape[-1] // self._group, self._group))
        low = _joined(groups & (2**self._low_bits - 1), self._low_bits)
        if not self._high_bits:
            return low
        high = _joined(groups >> self._low_bits, self._high_bits)
        per_byte = 8 // self._high_group_bits
        planes = high.unflatten(-1, (per_byte, high.shape[-1] // per_byte)).transpose(-1, -2)
        return torch.cat((low, _joined(planes, self._high_group_bits)), dim=-1)

    def table(self, levels: Tensor) -> Tensor:
        """The numbers of every group: what `look_up` reads.

        Args:
            levels: `[2**bits]` float32, by code.
        """
        index = torch.arange(2 ** (8 + self._high_group_bits), device=levels.device).unsqueeze(-1)
        element = torch.arange(self._group, device=levels.device)
        low = (index >> (self._low_bits * element)) & (2**self._low_bits - 1)
        high = (index >> (8 + self._high_bits * element)) & (2**self._high_bits - 1)
        numbers = levels[(high << self._low_bits) | low].view(torch.float64)
        return numbers.squeeze(-1) if self._group == 2 else torch.view_as_complex(numbers)

    def look_up(self, packed: Tensor, table: Tensor) -> Tensor:
        """Bytes `[n, count * bits / 8]` to their numbers `[n, count]` float32, a new tensor."""
        num_rows, num_groups = len(packed), packed.shape[-1] * 8 // (self.bits * self._group)
        index = packed[:, :num_groups].to(torch.int32)
        if self._high_bits:
            per_byte = 8 // self._high_group_bits
            parts = index.view(num_rows, per_byte, num_groups // per_byte)
            plane = packed[:, num_groups:]
            for place in range(per_byte):
                bits = (plane >> (place * self._high_group_bits)) & (2**self._high_group_bits - 1)
                parts[:, place].add_(bits.to(torch.int32), alpha=256)
        items = torch.index_select(table, 0, index.flatten())
        numbers = torch.view_as_real(items) if items.is_complex() else items
        return numbers.view(torch.float32).view(num_rows, num_groups * self._group)


def _joined(parts: Tensor, width: int) -> Tensor:
    """`[..., k]` small numbers of `width` bits to `[...]` bytes, the first one lowest."""
    joined = parts[..., 0].clone()
    for place in range(1, parts.shape[-1]):
        joined |= parts[..., place] << (place * width)
    return joined
