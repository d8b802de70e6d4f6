"""Which scales groups of numbers get."""

from __future__ import annotations

import pytest
import torch

from kvcfg.dtypes import DType
from kvcfg.formats import FORMATS, Recipe
from kvcfg.formats.codec import Codec, Encoded
from kvcfg.registry import load_object

DIM = 64


def stored(
    name: str, numbers: torch.Tensor, scale_dtype: str = "float32", block_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and zeros, of heads; and what is read of them."""
    element = FORMATS[name]
    granularity = "token_head" if block_size is None else "block"
    recipe = Recipe(element, element, granularity, "dynamic", DType[scale_dtype], block_size)  # type: ignore[arg-type]
    codec = Codec(recipe.keys, 1, numbers.shape[-1])
    encoded: Encoded = codec.encode(numbers.unsqueeze(1))
    return (
        encoded.scales.view(DType[scale_dtype].to_torch()).to(torch.float32),
        codec.decode(encoded, torch.float32)[:, 0],
    )


def normal(rows: int = 200) -> torch.Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["int8", "int6", "gauss5", "float8_e4m3fn"])
def test_the_largest_number_takes_the_largest_element(name: str) -> None:
    numbers = normal()
    expected = numbers.abs().amax(1, keepdim=True) / FORMATS[name].max_value
    assert torch.equal(stored(name, numbers)[0], expected)


@pytest.mark.parametrize("name", ["uint6", "uint5"])
def test_zeros_are_the_smallest_numbers(name: str) -> None:
    numbers = normal() + 5
    assert torch.equal(stored(name, numbers)[0][:, 1], numbers.amin(1))


@pytest.mark.parametrize(
    ("name", "full_range"),
    [("int3", 0.0632), ("uint3", 0.0370), ("gauss3", 0.0377), ("int2", 0.515), ("gauss2", 0.229)],
)
def test_narrower_ranges_lose_less_than_the_full_one(name: str, full_range: float) -> None:
    numbers = normal()
    assert (stored(name, numbers)[1] - numbers).square().mean() < 0.85 * full_range


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "uint4", "uint3", "uint2", "gauss4", "gauss3", "gauss2"])
def test_no_head_loses_more_than_with_its_full_range(name: str) -> None:
    numbers = normal() * torch.logspace(-3, 3, 200)[:, None]
    numbers[::3, 5] *= 20
    element = FORMATS[name]
    low = numbers.amin(1, keepdim=True) if element.asymmetric else torch.zeros(200, 1)
    high = numbers.amax(1, keepdim=True) if element.asymmetric else numbers.abs().amax(1, keepdim=True)
    scale = (high - low) / element.max_value
    chosen = stored(name, numbers)[1]
    full = load_object(element.codec)(element).rounded((numbers - low) / scale) * scale + low
    assert ((chosen - numbers).square().sum(1) <= (full - numbers).square().sum(1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("scale_dtype", ["float8_e4m3fn", "float8_e8m0fnu"])
@pytest.mark.parametrize("name", ["int8", "int6", "float8_e4m3fn"])
def test_coarse_scales_are_rounded_up(name: str, scale_dtype: str) -> None:
    numbers = normal() * 10
    scales = stored(name, numbers, scale_dtype)[0]
    exact = numbers.abs().amax(1, keepdim=True) / FORMATS[name].max_value
    step = 2.0 if scale_dtype == "float8_e8m0fnu" else 1.125
    assert ((scales >= exact) & (scales <= step * exact)).all()


def test_small_numbers_are_not_lost_to_float16_scales() -> None:
    numbers = normal() * 1e-4
    # amax / 127 is about 2e-6, far below the smallest normal float16.
    back = stored("int8", numbers, "float16")[1]
    assert (back - numbers).square().mean() < 1e-3 * numbers.square().mean()


def test_small_blocks_are_not_lost_to_e4m3_scales() -> None:
    numbers = normal() * 0.003
    scales, back = stored("float4_e2m1fn", numbers, "float8_e4m3fn", 16)
    assert (scales >= 2**-9).all()
    assert (back - numbers).square().mean() < 0.2 * numbers.square().mean()


def test_a_group_of_zeros_has_scale_zero_only_where_no_level_is_zero() -> None:
    zeros = torch.zeros(1, DIM)
    assert stored("int4", zeros)[0].item() == 1.0
    assert stored("gauss4", zeros)[0].item() == 0.0


def test_nvfp4_reads_as_a_simulation_of_it() -> None:
    numbers = normal()
    scales, back = stored("float4_e2m1fn", numbers, "float8_e4m3fn", 16)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat((-levels, levels))
    blocks = numbers.view(200, 4, 16)
    distance = (blocks.unsqueeze(-1) - levels * scales[..., None, None]).abs().amin(-1)
    assert ((back.view(200, 4, 16) - blocks).abs() <= distance + scales.unsqueeze(-1) * 12 / 8192).all()
    assert torch.isin(back.view(200, 4, 16) / scales.unsqueeze(-1), levels).all()


@pytest.mark.parametrize(("scale_dtype", "block_size"), [("float8_e4m3fn", 16), ("float8_e8m0fnu", 32)])
def test_nvfp4_and_mxfp4_store_what_was_read_as_the_same_bytes(scale_dtype: str, block_size: int) -> None:
    element = FORMATS["float4_e2m1fn"]
    codec = Codec(Recipe(element, element, "block", "dynamic", DType[scale_dtype], block_size).keys, 1, DIM)
    once = codec.encode(normal().unsqueeze(1))
    again = codec.encode(codec.decode(once, torch.float32))
    assert torch.equal(again.elements, once.elements) and torch.equal(again.scales, once.scales)
