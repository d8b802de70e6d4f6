"""Contract of every format: what goes in comes out within the format's own error, and bytes are as planned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.dtypes import DType
from kvcfg.formats import FORMATS, SCALE_DTYPES, Format, Recipe
from kvcfg.formats.codec import Encoded, TokenCodec

N_HEADS, DIM = 3, 32

RELATIVE_ERROR = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
"""Largest error of a float format, as a share of the number itself."""

STEPS = {"float8_e4m3fn": 2**-4, "int8": 0.5 / 127}
"""Largest error of a scaled format, as a share of the largest number under the same scale."""


def recipe_of(element_format: Format, granularity: str | None = None, scale_dtype: str = "float32") -> Recipe:
    granularity = granularity or ("token_head" if element_format.scaled else "none")
    block = 8 if granularity == "block" else None
    source = "dynamic" if granularity in ("token_head", "block") else "unit"
    return Recipe(element_format, element_format, granularity, source, DType[scale_dtype], block)  # type: ignore[arg-type]


def codec_of(element_format: Format, granularity: str | None = None, scale_dtype: str = "float32") -> TokenCodec:
    return TokenCodec(element_format, recipe_of(element_format, granularity, scale_dtype), N_HEADS, DIM)


def round_trip(codec: TokenCodec, numbers: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(numbers), torch.float32)


def numbers_of(num_tokens: int = 40, spread: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.logspace(-spread, spread, num_tokens)[:, None, None]
    return torch.randn(num_tokens, N_HEADS, DIM, generator=generator) * magnitudes


EVERY_FORMAT = pytest.mark.parametrize("element_format", FORMATS.values(), ids=FORMATS)
SCALED_FORMATS = pytest.mark.parametrize("element_format", [item for item in FORMATS.values() if item.scaled], ids=str)


@EVERY_FORMAT
def test_facts_of_the_table_are_those_of_torch(element_format: Format) -> None:
    dtype = element_format.dtype.to_torch()
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    assert element_format.bits == limits.bits
    assert element_format.max_value == pytest.approx(limits.max, rel=1e-12)


@EVERY_FORMAT
def test_bytes_are_those_of_the_plan(element_format: Format) -> None:
    recipe, codec = recipe_of(element_format), codec_of(element_format)
    encoded = codec.encode(numbers_of(5))
    assert (encoded.elements.dtype, encoded.scales.dtype) == (torch.uint8, torch.uint8)
    # One side of a page, so half of what a page of 5 tokens takes.
    assert encoded.elements.nbytes + encoded.scales.nbytes == recipe.page_bytes(5, N_HEADS, DIM, DIM) / 2


@EVERY_FORMAT
def test_round_trip_error_is_within_half_a_step(element_format: Format) -> None:
    numbers = numbers_of()
    if element_format.scaled:
        bound = STEPS[element_format.name] * numbers.abs().amax(-1, keepdim=True)
    else:
        # float16 has no more than 2**-24 near zero.
        bound = (RELATIVE_ERROR[element_format.name] * numbers.abs()).clamp(min=2**-25)
    assert ((round_trip(codec_of(element_format), numbers) - numbers).abs() <= bound * (1 + 1e-6)).all()


@EVERY_FORMAT
def test_what_was_read_is_stored_again_without_loss(element_format: Format) -> None:
    once = round_trip(codec_of(element_format), numbers_of())
    torch.testing.assert_close(round_trip(codec_of(element_format), once), once, rtol=1e-6, atol=0)


@EVERY_FORMAT
def test_input_is_left_unchanged(element_format: Format) -> None:
    numbers = numbers_of()
    before = numbers.clone()
    codec_of(element_format).encode(numbers)
    assert torch.equal(numbers, before)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_compute_dtype_is_taken_and_returned(element_format: Format, dtype: torch.dtype) -> None:
    codec = codec_of(element_format)
    assert codec.decode(codec.encode(numbers_of(spread=1).to(dtype)), dtype).dtype == dtype


@EVERY_FORMAT
def test_zeros_come_back_as_zeros(element_format: Format) -> None:
    zeros = torch.zeros(4, N_HEADS, DIM)
    assert torch.equal(round_trip(codec_of(element_format), zeros), zeros)


@EVERY_FORMAT
def test_constants_come_back(element_format: Format) -> None:
    numbers = torch.full((4, N_HEADS, DIM), -0.75)
    torch.testing.assert_close(round_trip(codec_of(element_format), numbers), numbers, rtol=1e-6, atol=0)


@EVERY_FORMAT
def test_nan_stays_in_its_own_token(element_format: Format) -> None:
    numbers = numbers_of(spread=1)
    numbers[7, 1, 3] = torch.nan
    back = round_trip(codec_of(element_format), numbers)
    assert back[7, 1, 3].isnan()
    assert back[:7].isfinite().all() and back[8:].isfinite().all() and back[7, 0].isfinite().all()


@EVERY_FORMAT
def test_denormals_do_no_harm(element_format: Format) -> None:
    numbers = torch.full((4, N_HEADS, DIM), 1e-42)
    assert round_trip(codec_of(element_format), numbers).abs().max() <= 2e-42


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "float16", "bfloat16"])
def test_infinity_saturates_and_spares_other_tokens(name: str) -> None:
    numbers = numbers_of(spread=1)
    numbers[7, 1, 3] = torch.inf
    back = round_trip(codec_of(FORMATS[name]), numbers)
    assert back[7, 1, 3] > 1000
    assert not back.isnan().any()
    assert back[:7].isfinite().all() and back[8:].isfinite().all()


@pytest.mark.parametrize("value", [449.0, 1e6, -1e6])
def test_fp8_at_unit_scale_saturates_at_its_largest(value: float) -> None:
    numbers = torch.full((2, N_HEADS, DIM), value)
    back = round_trip(codec_of(FORMATS["float8_e4m3fn"], "tensor"), numbers)
    assert torch.equal(back, torch.full_like(back, 448.0).copysign(numbers))


def test_fp8_elements_are_read_as_torch_reads_them() -> None:
    from kvcfg.formats.fp8 import FP8

    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    torch.testing.assert_close(
        FP8(torch.float8_e4m3fn).from_elements(every), every.to(torch.float32), rtol=0, atol=0, equal_nan=True
    )


@SCALED_FORMATS
@pytest.mark.parametrize("granularity", ["token_head", "block"])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_scale_dtypes_cost_little_accuracy(element_format: Format, granularity: str, scale_dtype: str) -> None:
    numbers = numbers_of(spread=1)
    back = round_trip(codec_of(element_format, granularity, scale_dtype), numbers)
    # Powers of two waste up to a bit of the elements; the others next to nothing.
    allowed = {"float8_e8m0fnu": 2.1}.get(scale_dtype, 1.02)
    bound = STEPS[element_format.name] * allowed * numbers.abs().amax(-1, keepdim=True)
    assert ((back - numbers).abs() <= bound).all()


@SCALED_FORMATS
def test_blocks_confine_an_outlier(element_format: Format) -> None:
    numbers = numbers_of(spread=0)
    numbers[:, :, 0] = 1000.0
    by_head = (round_trip(codec_of(element_format, "token_head"), numbers) - numbers)[..., 8:].norm()
    by_block = (round_trip(codec_of(element_format, "block"), numbers) - numbers)[..., 8:].norm()
    assert by_block < by_head


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=DIM, max_size=DIM),
    st.sampled_from(sorted(FORMATS)),
)
def test_any_finite_numbers_come_back_finite_and_in_order(row: list[float], name: str) -> None:
    numbers = torch.tensor(row).expand(1, N_HEADS, DIM)
    back = round_trip(codec_of(FORMATS[name]), numbers)[0, 0]
    assert not back.isnan().any()
    order = torch.tensor(row).argsort()
    assert (back[order].diff() >= 0).all()


def test_rows_are_plain_bytes_that_can_be_reordered() -> None:
    codec = codec_of(FORMATS["int8"])
    numbers = numbers_of()
    encoded = codec.encode(numbers)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))
    moved = codec.decode(Encoded(encoded.elements[order], encoded.scales[order]), torch.float32)
    assert torch.equal(moved, codec.decode(encoded, torch.float32)[order])
