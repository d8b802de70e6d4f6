"""The codebooks for normal numbers are the best there are: they meet Lloyd's and Max's conditions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kvcfg.dtypes import DType
from kvcfg.formats import FORMATS, Recipe
from kvcfg.formats.codec import Codec
from kvcfg.formats.gaussian import Gaussian, gaussian_levels

DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002505, 6: 0.0006442}
"""Mean squared error of the best codebooks of b bits on numbers of variance 1: up to 4 bits as published by Max in
1960, 5 and 6 bits by integrating over levels that meet the conditions (26.01 and 31.91 dB)."""

EVERY_SIZE = pytest.mark.parametrize("bits", DISTORTION)
EVERY_FORMAT = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])

POINTS = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64)
WEIGHTS = torch.exp(-POINTS.square() / 2) / (2 * torch.pi) ** 0.5 * (POINTS[1] - POINTS[0])


def cells(levels: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(POINTS, (levels[1:] + levels[:-1]) / 2)


@EVERY_SIZE
def test_every_level_is_the_mean_of_its_cell(bits: int) -> None:
    levels = torch.tensor(gaussian_levels(bits), dtype=torch.float64)
    place = cells(levels)
    share = torch.zeros(len(levels), dtype=torch.float64).index_add(0, place, WEIGHTS)
    mean = torch.zeros(len(levels), dtype=torch.float64).index_add(0, place, WEIGHTS * POINTS) / share
    # Levels have 6 decimals; a sum over points 1e-5 apart is off where a threshold falls between two.
    assert (levels - mean).abs().max() < 5e-6


@EVERY_SIZE
def test_distortion_is_the_known_one(bits: int) -> None:
    levels = torch.tensor(gaussian_levels(bits), dtype=torch.float64)
    error = (WEIGHTS * (POINTS - levels[cells(levels)]).square()).sum()
    assert error == pytest.approx(DISTORTION[bits], rel=5e-4)


@EVERY_SIZE
def test_levels_are_symmetric_and_ascend(bits: int) -> None:
    levels = gaussian_levels(bits)
    assert len(levels) == 2**bits
    assert levels == tuple(-level for level in reversed(levels))
    assert all(low < high for low, high in pairwise(levels))


@EVERY_FORMAT
def test_largest_level_is_the_one_of_the_table(bits: int) -> None:
    assert FORMATS[f"gauss{bits}"].max_value == gaussian_levels(bits)[-1]


@EVERY_FORMAT
def test_normal_numbers_lose_what_theory_says(bits: int) -> None:
    numbers = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(0))
    codec = Gaussian(FORMATS[f"gauss{bits}"])
    error = (codec.from_elements(codec.to_elements(numbers)) - numbers).square().mean()
    assert error == pytest.approx(DISTORTION[bits], rel=0.01)


@EVERY_FORMAT
def test_a_scale_for_each_head_loses_less_than_one_for_all(bits: int) -> None:
    numbers = torch.randn(50, 64, 3, 64, generator=torch.Generator().manual_seed(0))
    element = FORMATS[f"gauss{bits}"]
    codec = Codec(Recipe(element, element, "token_head", "dynamic", DType.float16).keys, 3, 64, 64)
    error = (codec.decode(codec.encode(numbers), torch.float32) - numbers).square().mean()
    assert error < DISTORTION[bits]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_levels_at_equal_distances_lose_more(bits: int) -> None:
    numbers = torch.randn(50, 64, 3, 64, generator=torch.Generator().manual_seed(0))

    def error(name: str) -> torch.Tensor:
        element = FORMATS[name]
        codec = Codec(Recipe(element, element, "token_head", "dynamic", DType.float16).keys, 3, 64, 64)
        return (codec.decode(codec.encode(numbers), torch.float32) - numbers).square().mean()

    assert error(f"gauss{bits}") < error(f"int{bits}")
