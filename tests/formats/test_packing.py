"""Elements of 6 to 2 bits as bytes: nothing is lost, nothing is wasted, and what is looked up is what was packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.formats.packing import Packing

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])


def looked_up(packing: Packing, packed: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return packing.look_up(packed, packing.table(levels))


@BITS
@given(data=st.data())
def test_any_codes_come_back(bits: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 3))
    count = 8 * data.draw(st.integers(1, 5))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count))
    packing = Packing(bits)
    packed = packing.pack(torch.tensor(codes, dtype=torch.uint8).view(rows, count))
    assert packed.shape == (rows, count * bits // 8)
    back = looked_up(packing, packed, torch.arange(2**bits, dtype=torch.float32))
    assert back.flatten().tolist() == codes


@BITS
def test_every_bit_is_used(bits: int) -> None:
    codes = torch.full((1, 64), 2**bits - 1, dtype=torch.uint8)
    assert (Packing(bits).pack(codes) == 255).all()


@BITS
def test_levels_are_read_exactly(bits: int) -> None:
    levels = torch.randn(2**bits, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(4)[None]
    packing = Packing(bits)
    assert torch.equal(looked_up(packing, packing.pack(codes), levels)[0], levels.repeat(4))


@BITS
def test_rows_may_be_parts_of_wider_rows(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packing = Packing(bits)
    packed = packing.pack(codes)
    wider = torch.cat((packed, torch.full_like(packed, 7)), dim=1)[:, : packed.shape[1]]
    levels = torch.arange(2**bits, dtype=torch.float32)
    assert torch.equal(looked_up(packing, wider, levels), codes.to(torch.float32))


def test_first_of_two_elements_has_the_lower_half_of_its_byte() -> None:
    assert Packing(4).pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)).tolist() == [
        [0x21, 0x43, 0x65, 0x87]
    ]


def test_high_bits_follow_in_a_plane_of_their_own() -> None:
    # 5 bits: four low bits of each, then the fifth bits, pair 0 in the lowest two.
    codes = torch.tensor([[16, 0, 0, 16, 0, 0, 16, 16]], dtype=torch.uint8)
    assert Packing(5).pack(codes).tolist() == [[0, 0, 0, 0, 0b11_00_10_01]]
