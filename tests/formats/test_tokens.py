"""Tokens stored one by one, a row of bytes each, in every format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.dtypes import DType
from kvcfg.formats import FORMATS, Format, Recipe
from kvcfg.formats.codec import Codec, Encoded

N_HEADS, DIM = 3, 32

RELATIVE_ERROR = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
"""Largest error of a float format, as a share of the number itself."""

EVERY_FORMAT = pytest.mark.parametrize("element_format", FORMATS.values(), ids=FORMATS)
SCALED_FORMATS = pytest.mark.parametrize(
    "element_format", [item for item in FORMATS.values() if item.scaled], ids=lambda item: item.name
)


def codec_of(element_format: Format, granularity: str | None = None, block_size: int | None = None) -> Codec:
    granularity = granularity or ("token_head" if element_format.scaled else "none")
    recipe = Recipe(element_format, element_format, granularity, "dynamic", DType.float32, block_size)  # type: ignore[arg-type]
    return Codec(recipe.keys, N_HEADS, DIM)


def round_trip(codec: Codec, numbers: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(numbers), torch.float32)


def numbers_of(num_tokens: int = 40, spread: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.logspace(-spread, spread, num_tokens)[:, None, None]
    return torch.randn(num_tokens, N_HEADS, DIM, generator=generator) * magnitudes


@pytest.mark.parametrize("name", RELATIVE_ERROR)
def test_float_formats_round_each_number(name: str) -> None:
    numbers = numbers_of()
    # float16 has no more than 2**-24 near zero.
    bound = (RELATIVE_ERROR[name] * numbers.abs()).clamp(min=2**-25)
    assert ((round_trip(codec_of(FORMATS[name]), numbers) - numbers).abs() <= bound).all()


@pytest.mark.parametrize("value", [70000.0, -1e6])
def test_float16_saturates_at_its_largest(value: float) -> None:
    numbers = torch.full((2, N_HEADS, DIM), value)
    assert torch.equal(
        round_trip(codec_of(FORMATS["float16"]), numbers), torch.full_like(numbers, 65504.0).copysign(numbers)
    )


@pytest.mark.parametrize(("name", "largest"), [("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)])
@pytest.mark.parametrize("value", [60000.0, -1e6, torch.inf])
def test_fp8_at_unit_scale_saturates_at_its_largest(name: str, largest: float, value: float) -> None:
    numbers = torch.full((2, N_HEADS, DIM), value)
    back = round_trip(codec_of(FORMATS[name], "tensor"), numbers)
    assert torch.equal(back, torch.full_like(back, largest).copysign(numbers))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_elements_are_read_as_torch_reads_them(name: str) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(DType[name].to_torch())
    codec = codec_of(FORMATS[name], "tensor")
    encoded = Encoded(torch.nn.functional.pad(every.view(torch.uint8), (0, 32)).view(3, 96), torch.empty(3, 0))
    read = codec.decode(encoded, torch.float32).flatten()[:256]
    torch.testing.assert_close(read, every.to(torch.float32), rtol=0, atol=0, equal_nan=True)


@SCALED_FORMATS
def test_blocks_confine_an_outlier(element_format: Format) -> None:
    numbers = numbers_of(spread=0)
    numbers[:, :, 0] = 1000.0
    by_head = (round_trip(codec_of(element_format, "token_head"), numbers) - numbers)[..., 8:].norm()
    by_block = (round_trip(codec_of(element_format, "block", 8), numbers) - numbers)[..., 8:].norm()
    assert by_block < by_head


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=DIM, max_size=DIM),
    st.sampled_from(sorted(FORMATS)),
)
def test_any_finite_numbers_come_back_finite_and_in_order(row: list[float], name: str) -> None:
    numbers = torch.tensor(row).expand(1, N_HEADS, DIM)
    back = round_trip(codec_of(FORMATS[name]), numbers)[0, 0]
    assert back.isfinite().all()
    order = torch.tensor(row).argsort()
    assert (back[order].diff() >= 0).all()


@EVERY_FORMAT
def test_rows_are_plain_bytes_that_can_be_reordered(element_format: Format) -> None:
    codec, numbers = codec_of(element_format), numbers_of()
    encoded = codec.encode(numbers)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))
    moved = codec.decode(Encoded(encoded.elements[order], encoded.scales[order]), torch.float32)
    assert torch.equal(moved, codec.decode(encoded, torch.float32)[order])


@EVERY_FORMAT
def test_no_tokens_are_no_bytes(element_format: Format) -> None:
    codec = codec_of(element_format)
    encoded = codec.encode(torch.empty(0, N_HEADS, DIM))
    assert encoded.elements.shape == (0, codec.element_row_bytes)
    assert codec.decode(encoded, torch.float32).shape == (0, N_HEADS, DIM)


@EVERY_FORMAT
def test_a_latent_has_values_of_no_width(element_format: Format) -> None:
    granularity = "token_head" if element_format.scaled else "none"
    side = Recipe(element_format, element_format, granularity, "dynamic", DType.float32).values  # type: ignore[arg-type]
    codec = Codec(side, 1, 0)
    encoded = codec.encode(torch.empty(5, 1, 0))
    assert (encoded.elements.shape, encoded.scales.shape) == ((5, 0), (5, 0))
    assert codec.decode(encoded, torch.float32).shape == (5, 1, 0)
