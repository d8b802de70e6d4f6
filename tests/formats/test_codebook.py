"""The levels of formats of few bits, and which one a number goes to."""

from __future__ import annotations

import pytest
import torch

from kvcfg.formats import FORMATS, Format
from kvcfg.formats.codebook import Codebook
from kvcfg.registry import load_object

PACKED = [item for item in FORMATS.values() if item.is_packed]
EVERY_CODEBOOK = pytest.mark.parametrize("element_format", PACKED, ids=lambda item: item.name)


def codebook_of(name: str) -> Codebook:
    codebook: Codebook = load_object(FORMATS[name].codec)(FORMATS[name])
    return codebook


@EVERY_CODEBOOK
def test_levels_are_as_many_as_bits_allow_and_none_is_beyond_the_largest(element_format: Format) -> None:
    levels = codebook_of(element_format.name).levels
    assert len(levels) == 2**element_format.bits
    assert levels.abs().max() == pytest.approx(element_format.max_value, rel=1e-6)


@EVERY_CODEBOOK
def test_numbers_go_to_the_nearest_level(element_format: Format) -> None:
    codebook, largest = codebook_of(element_format.name), element_format.max_value
    numbers = torch.linspace(-1.5 * largest, 1.5 * largest, 9984).view(3, -1)
    distance = (numbers.unsqueeze(-1) - codebook.levels).abs().amin(-1)
    stored = codebook.from_elements(codebook.to_elements(numbers))
    # Within a cell of the grid from a threshold the other level is as good.
    assert ((stored - numbers).abs() <= distance + 2.01 * largest / 8192).all()


@EVERY_CODEBOOK
def test_rounding_to_a_level_is_what_storing_does(element_format: Format) -> None:
    codebook = codebook_of(element_format.name)
    numbers = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * element_format.max_value
    assert torch.equal(codebook.rounded(numbers), codebook.from_elements(codebook.to_elements(numbers)))


@EVERY_CODEBOOK
def test_levels_are_stored_as_themselves(element_format: Format) -> None:
    codebook = codebook_of(element_format.name)
    levels = codebook.levels.repeat(2)[None]
    assert torch.equal(codebook.from_elements(codebook.to_elements(levels)), levels)


@EVERY_CODEBOOK
def test_nan_and_infinities_are_stored_as_some_level(element_format: Format) -> None:
    codebook = codebook_of(element_format.name)
    numbers = torch.tensor([[torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0, 0.0, 0.0]])
    stored = codebook.from_elements(codebook.to_elements(numbers))[0]
    assert torch.isin(stored, codebook.levels).all()
    assert stored[1] == stored[3] == codebook.levels.max() and stored[2] == stored[4] == codebook.levels.min()


def test_float4_levels_are_in_the_order_of_their_bits() -> None:
    # Sign, two exponent bits of bias 1, one mantissa bit.
    def value(code: int) -> float:
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        return -magnitude if code >> 3 else magnitude

    assert codebook_of("float4_e2m1fn").levels.tolist() == [value(code) for code in range(16)]


@pytest.mark.parametrize(
    ("name", "levels"),
    [("int2", [-1, 0, 1, 1]), ("int3", [-3, -2, -1, 0, 1, 2, 3, 3]), ("uint2", [0, 1, 2, 3])],
)
def test_uniform_levels_count_up_from_the_lowest(name: str, levels: list[float]) -> None:
    assert codebook_of(name).levels.tolist() == levels
