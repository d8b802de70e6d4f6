"""Contract of every format: what goes in comes out within the format's own error, and bytes are as planned.

Every format is tested with every granularity that stores scales, as it is, after a Hadamard transform and less the
mean of its page, on pages of 32 tokens; `tests/formats/test_tokens.py` tests tokens one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch

from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError
from kvcfg.formats import FORMATS, SCALE_DTYPES, Format, Granularity, Recipe, SideRecipe, Transform
from kvcfg.formats.codec import Codec
from kvcfg.formats.gaussian import gaussian_levels

PAGES, TOKENS, N_HEADS, DIM = 4, 32, 2, 32

HALF_GAPS = {
    "float8_e4m3fn": 16.0,
    "float8_e5m2": 4096.0,
    "float4_e2m1fn": 1.0,
    **{f"gauss{bits}": (gaussian_levels(bits)[-1] - gaussian_levels(bits)[-2]) / 2 for bits in (6, 5, 4, 3, 2)},
}
"""Half of the widest gap between two levels, in units of the scale; 0.5 for whole numbers."""


@cache
def codec_of(side: SideRecipe) -> Codec:
    return Codec(side, N_HEADS, DIM, TOKENS)


@dataclass(frozen=True)
class Case:
    element_format: Format
    granularity: Granularity
    block_size: int | None
    transform: Transform

    def __str__(self) -> str:
        return f"{self.element_format.name}-{self.granularity}{self.block_size or ''}-{self.transform}"

    def recipe(self, scale_dtype: DType = DType.float32) -> Recipe:
        element, source = self.element_format, "dynamic" if self.element_format.scaled else "unit"
        changes = {"transform": self.transform, "sink_tokens": 2 if self.transform == "centred" else 0}
        return Recipe(element, element, self.granularity, source, scale_dtype, self.block_size, **changes)  # type: ignore[arg-type]

    def codec(self, scale_dtype: DType = DType.float32) -> Codec:
        return codec_of(self.recipe(scale_dtype).keys)

    def grouped(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers that share a scale along the last axis; only without a transform."""
        if self.granularity == "channel":
            return numbers.unflatten(1, (-1, self.block_size or TOKENS)).movedim(2, -1)
        return numbers.unflatten(-1, (-1, self.block_size or DIM))


SHARING: list[tuple[Granularity, int | None]] = [("token_head", None), ("block", 8), ("channel", None), ("channel", 16)]
SCALED = [
    Case(item, *sharing, transform)  # type: ignore[arg-type]
    for item, sharing, transform in product(FORMATS.values(), SHARING, ("none", "hadamard", "centred"))
    if item.scaled and not (sharing[0] == "channel" and transform == "centred")
]
UNSCALED = [
    Case(item, "none", None, transform)  # type: ignore[arg-type]
    for item, transform in product(FORMATS.values(), ("none", "hadamard"))
    if not item.scaled
]
PLAIN = [case for case in SCALED if case.transform == "none"]

EVERY_CASE = pytest.mark.parametrize("case", [*SCALED, *UNSCALED], ids=str)
SCALED_CASES = pytest.mark.parametrize("case", SCALED, ids=str)
PLAIN_CASES = pytest.mark.parametrize("case", PLAIN, ids=str)


def numbers_of(pages: int = PAGES, spread: int = 2, seed: int = 0) -> torch.Tensor:
    """Normal numbers around a mean of their channel, pages of very different size."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(N_HEADS, DIM, generator=generator)
    numbers = torch.randn(pages, TOKENS, N_HEADS, DIM, generator=generator) + means
    return numbers * torch.logspace(-spread, spread, pages)[:, None, None, None]


def round_trip(codec: Codec, numbers: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(numbers), torch.float32)


def full_scale(element_format: Format, groups: torch.Tensor) -> torch.Tensor:
    """The scale that covers all numbers of a group."""
    width = groups.amax(-1) - groups.amin(-1) if element_format.asymmetric else groups.abs().amax(-1)
    return width / element_format.max_value


@EVERY_CASE
def test_bytes_are_those_of_the_plan(case: Case) -> None:
    encoded = case.codec().encode(numbers_of(2))
    assert (encoded.elements.dtype, encoded.scales.dtype) == (torch.uint8, torch.uint8)
    assert encoded.elements.nbytes + encoded.scales.nbytes == 2 * case.recipe().page_bytes(TOKENS, N_HEADS, DIM, 0)


@EVERY_CASE
def test_input_is_left_unchanged(case: Case) -> None:
    numbers = numbers_of()
    before = numbers.clone()
    case.codec().encode(numbers)
    assert torch.equal(numbers, before)


@EVERY_CASE
def test_numbers_need_not_be_contiguous(case: Case) -> None:
    numbers = numbers_of().to(torch.bfloat16)
    elements, scales = case.codec().encode(numbers.transpose(1, 2).contiguous().transpose(1, 2))
    expected = case.codec().encode(numbers)
    assert torch.equal(elements, expected.elements) and torch.equal(scales, expected.scales)


@pytest.mark.parametrize("case", [case for case in PLAIN if case.element_format.bits >= 5], ids=str)
def test_every_error_is_within_half_a_gap_from_5_bits_on(case: Case) -> None:
    numbers = numbers_of()
    error = case.grouped((round_trip(case.codec(), numbers) - numbers).abs())
    bound = HALF_GAPS.get(case.element_format.name, 0.5) * full_scale(case.element_format, case.grouped(numbers))
    # A codebook may put a number on the wrong side of a threshold that is a 16,384th of the range away.
    assert (error <= bound.unsqueeze(-1) * 1.005).all()


@PLAIN_CASES
def test_squared_error_of_a_group_is_within_half_gaps(case: Case) -> None:
    # However far a range is narrowed, the full one was tried too.
    numbers = numbers_of()
    error = case.grouped(round_trip(case.codec(), numbers) - numbers).square().mean(-1).sqrt()
    bound = HALF_GAPS.get(case.element_format.name, 0.5) * full_scale(case.element_format, case.grouped(numbers))
    assert (error <= bound * (1 + 1e-4)).all()


@SCALED_CASES
def test_error_is_a_small_share_of_the_numbers(case: Case) -> None:
    # A transform keeps lengths, and no number of a head is longer than the head.
    numbers = numbers_of()
    lengths = (1, 3) if case.granularity == "channel" else (3,)
    error = (round_trip(case.codec(), numbers) - numbers).square().mean(lengths).sqrt()
    element = case.element_format
    widest = HALF_GAPS.get(element.name, 0.5) / element.max_value * (2 if element.asymmetric else 1)
    longest = numbers.norm(dim=3).amax(1) if case.granularity == "channel" else numbers.norm(dim=3)
    assert (error <= widest * longest).all()


@pytest.mark.parametrize(
    "case",
    [case for case in (*SCALED, *UNSCALED) if case not in UNSCALED[1::2] and case.transform != "centred"],
    ids=str,
)
@pytest.mark.parametrize("scale_dtype", [DType.float16, DType.bfloat16], ids=str)
def test_what_was_read_is_stored_as_the_same_bytes(case: Case, scale_dtype: DType) -> None:
    codec = case.codec(scale_dtype)
    # Large enough for formats that reach 57344 to have normal float16 scales, small enough for float16 zeros.
    once = codec.encode(numbers_of() * (1e3 if case.element_format.dtype.is_float8() else 1))
    again = codec.encode(codec.decode(once, torch.float32))
    assert torch.equal(again.elements, once.elements)
    assert torch.equal(again.scales, once.scales)


@pytest.mark.parametrize("case", [case for case in (*SCALED, *UNSCALED) if case.transform != "centred"], ids=str)
def test_what_was_read_is_stored_again_without_loss(case: Case) -> None:
    once = round_trip(case.codec(), numbers_of())
    largest = once.abs().amax((1, 2, 3), keepdim=True)
    bound = {"bfloat16": 2**-8, "float16": 2**-11}.get(case.element_format.name, 1e-5)
    assert ((round_trip(case.codec(), once) - once).abs() <= bound * largest).all()


@EVERY_CASE
def test_a_page_is_the_same_alone_and_among_others(case: Case) -> None:
    numbers, codec = numbers_of(), case.codec()
    together = codec.encode(numbers)
    read = codec.decode(together, torch.float32)
    for index in range(PAGES):
        alone = codec.encode(numbers[index : index + 1])
        assert torch.equal(alone.elements[0], together.elements[index])
        assert torch.equal(alone.scales[0], together.scales[index])
        assert torch.equal(codec.decode(alone, torch.float32)[0], read[index])


@pytest.mark.parametrize(
    "case", [case for case in (*SCALED, *UNSCALED) if not case.recipe().keys.spans_tokens], ids=str
)
def test_tokens_with_their_own_scales_read_the_same_one_by_one(case: Case) -> None:
    numbers = numbers_of()
    one_by_one = Codec(case.recipe().keys, N_HEADS, DIM)
    tokens = round_trip(one_by_one, numbers.flatten(0, 1))
    assert torch.equal(tokens.view(numbers.shape), round_trip(case.codec(), numbers))


@EVERY_CASE
def test_zeros_come_back_as_zeros(case: Case) -> None:
    zeros = torch.zeros(2, TOKENS, N_HEADS, DIM)
    assert torch.equal(round_trip(case.codec(DType.float16), zeros), zeros)


@PLAIN_CASES
def test_constants_come_back(case: Case) -> None:
    numbers = torch.full((2, TOKENS, N_HEADS, DIM), -0.75)
    torch.testing.assert_close(round_trip(case.codec(), numbers), numbers, rtol=1e-6, atol=0)


@EVERY_CASE
def test_nan_reaches_no_other_token(case: Case) -> None:
    numbers = numbers_of()
    numbers[2, 7, 1, 3] = torch.nan
    back = round_trip(case.codec(), numbers)
    back[2, 7, 1] = 0
    assert back.isfinite().all()


@pytest.mark.parametrize("case", [case for case in (*SCALED, *UNSCALED) if case.granularity != "channel"], ids=str)
def test_nan_comes_back_where_a_token_has_its_own_scales(case: Case) -> None:
    numbers = numbers_of()
    numbers[2, 7, 1, 3] = torch.nan
    assert round_trip(case.codec(), numbers)[2, 7, 1, 3].isnan()


@SCALED_CASES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_other_tokens_are_read_as_well_as_without_a_poisoned_one(case: Case, poison: float) -> None:
    numbers = numbers_of()
    clean = (round_trip(case.codec(), numbers) - numbers).abs()
    poisoned = numbers.clone()
    poisoned[2, 7, 1, 3] = poison
    error = (round_trip(case.codec(), poisoned) - numbers).abs()
    error[2, 7, 1] = clean[2, 7, 1] = 0
    # Where tokens share scales, one number less may narrow a range a little further.
    assert (error.amax((1, 2, 3)) <= 1.3 * clean.amax((1, 2, 3))).all()
    assert torch.equal(error[:2], clean[:2]) and torch.equal(error[3:], clean[3:])


@EVERY_CASE
def test_infinity_saturates(case: Case) -> None:
    numbers = numbers_of()
    numbers[2, 7, 1, 3] = torch.inf
    back = round_trip(case.codec(), numbers)
    if case.granularity != "channel":
        assert not back.isnan().any()
        assert back[2, 7, 1, 3] > 1000
    elif case.transform == "none":
        assert back.isfinite().all()
        assert back[2, 7, 1, 3] >= 0.9 * back[2, :, 1, 3].amax()


@EVERY_CASE
@pytest.mark.parametrize("outlier", [3e38, -3e38])
def test_huge_outliers_come_back_finite_where_the_format_is(case: Case, outlier: float) -> None:
    numbers = numbers_of()
    numbers[:, ::5, :, 3] = outlier
    back = round_trip(case.codec(), numbers)
    assert back.isfinite().all()
    assert (back[:, ::5, :, 3].sign() == torch.tensor(outlier).sign()).all()


@EVERY_CASE
def test_denormals_do_no_harm(case: Case) -> None:
    numbers = torch.full((2, TOKENS, N_HEADS, DIM), 1e-42)
    assert round_trip(case.codec(), numbers).abs().max() <= 6e-42


@pytest.mark.parametrize(
    ("case", "scale_dtype"),
    [
        (case, scale_dtype)
        for case, scale_dtype in product(SCALED, SCALE_DTYPES)
        if case.transform != "centred" and not (case.element_format.asymmetric and scale_dtype == "float8_e8m0fnu")
    ],
    ids=str,
)
def test_scales_are_never_infinite_nor_zero_beside_numbers(case: Case, scale_dtype: str) -> None:
    codec = case.codec(DType[scale_dtype])
    numbers = numbers_of() * torch.tensor([1e-30, 1.0, 1e10, 1e36])[:, None, None, None]
    stored = codec.encode(numbers).scales.view(DType[scale_dtype].to_torch()).to(torch.float32)
    assert stored.isfinite().all()
    if not case.element_format.asymmetric:
        assert (stored[1:] > 0).all()


@pytest.mark.parametrize(
    ("case", "scale_dtype"),
    [
        (case, scale_dtype)
        for case, scale_dtype in product(PLAIN, SCALE_DTYPES)
        # Zeros need a sign, and more than 3 bits after it where the mean of the numbers is not 0.
        if not (case.element_format.asymmetric and scale_dtype.startswith("float8"))
    ],
    ids=str,
)
def test_scale_dtypes_cost_little_accuracy(case: Case, scale_dtype: str) -> None:
    # So that all scales are normal e4m3 numbers.
    numbers = numbers_of(spread=0) * 10
    error = case.grouped(round_trip(case.codec(DType[scale_dtype]), numbers) - numbers).square().mean(-1).sqrt()
    # Powers of two waste up to a bit of the elements, 3 mantissa bits an eighth; the others next to nothing.
    allowed = {"float8_e8m0fnu": 2.0, "float8_e4m3fn": 1.125}.get(scale_dtype, 1.02)
    half_gap = HALF_GAPS.get(case.element_format.name, 0.5)
    if scale_dtype in ("bfloat16", "float16") and case.element_format.asymmetric:
        allowed += 2**-8 * case.element_format.max_value
    assert (error <= allowed * half_gap * full_scale(case.element_format, case.grouped(numbers))).all()


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("element_format", FORMATS.values(), ids=FORMATS)
def test_every_compute_dtype_is_taken_and_returned(
    element_format: Format, dtype: torch.dtype, transform: Transform
) -> None:
    case = Case(element_format, "token_head" if element_format.scaled else "none", None, transform)
    back = case.codec().decode(case.codec().encode(numbers_of().to(dtype)), dtype)
    assert (back.dtype, back.shape) == (dtype, (PAGES, TOKENS, N_HEADS, DIM))


@pytest.mark.parametrize("name", ["int8", "int4", "uint4", "gauss4"])
def test_a_transform_spreads_an_outlier_channel(name: str) -> None:
    numbers = numbers_of()
    numbers[..., 5] *= 50
    plain, turned = (
        (round_trip(Case(FORMATS[name], "token_head", None, transform).codec(), numbers) - numbers).square()
        for transform in ("none", "hadamard")
    )
    assert turned[..., 6:].mean() < 0.7 * plain[..., 6:].mean()


@pytest.mark.parametrize("name", ["int8", "int4", "uint4", "gauss4", "float4_e2m1fn"])
def test_scales_of_channels_confine_an_outlier_channel(name: str) -> None:
    numbers = numbers_of()
    numbers[..., 5] *= 50
    by_token, by_channel = (
        (round_trip(Case(FORMATS[name], granularity, None, "none").codec(), numbers) - numbers).square()
        for granularity in ("token_head", "channel")
    )
    assert by_channel[..., 6:].mean() < 0.1 * by_token[..., 6:].mean()


@pytest.mark.parametrize(
    ("side", "tokens", "dim", "key"),
    [
        (SideRecipe(FORMATS["int4"], "token_head", None, DType.float16), None, 12, "format"),
        (SideRecipe(FORMATS["int4"], "tensor", None, DType.float16), None, 16, "granularity"),
        (SideRecipe(FORMATS["uint4"], "token_head", None, DType.float8_e8m0fnu), None, 16, "scale_dtype"),
        (SideRecipe(FORMATS["int8"], "channel", None, DType.float16), None, 16, "block_size"),
        (SideRecipe(FORMATS["int8"], "channel", 64, DType.float16), 96, 16, "block_size"),
        (SideRecipe(FORMATS["int8"], "block", 12, DType.float16), None, 16, "block_size"),
    ],
)
def test_what_cannot_be_stored_is_refused(side: SideRecipe, tokens: int | None, dim: int, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Codec(side, N_HEADS, dim, tokens)
    assert [problem.key for problem in caught.value.problems] == [key]
