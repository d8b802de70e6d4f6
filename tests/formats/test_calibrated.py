"""What was calibrated beforehand: matrices of keys, and scales that do not follow the numbers."""

from __future__ import annotations

import pytest
import torch

from kvcfg.dtypes import DType
from kvcfg.errors import ShapeError
from kvcfg.formats import FORMATS, Granularity, SideRecipe
from kvcfg.formats.codec import Calibrated, Codec, clip_rate
from kvcfg.formats.transforms import Hadamard

TOKENS, N_HEADS, DIM = 32, 2, 32
BALANCED = SideRecipe(FORMATS["gauss4"], "token_head", None, DType.float16, "balanced", 1)


def pages_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, TOKENS, N_HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def error(codec: Codec, numbers: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(numbers), torch.float32) - numbers


def test_a_hadamard_matrix_for_every_head_is_the_centred_transform() -> None:
    hadamard = Hadamard(DIM).apply(torch.eye(DIM)).expand(N_HEADS, DIM, DIM)
    balanced = Codec(BALANCED, N_HEADS, DIM, TOKENS, Calibrated(hadamard))
    centred = Codec(
        SideRecipe(FORMATS["gauss4"], "token_head", None, DType.float16, "centred", 1), N_HEADS, DIM, TOKENS
    )
    pages = pages_of()
    torch.testing.assert_close(error(balanced, pages), error(centred, pages), rtol=1e-3, atol=1e-3)


def test_each_head_has_its_own_matrix() -> None:
    # The second head finds its first channel ten times as dear.
    matrices = torch.eye(DIM).repeat(N_HEADS, 1, 1)
    matrices[1, 0, 0] = 10.0
    matrices = matrices @ Hadamard(DIM).apply(torch.eye(DIM))
    codec = Codec(BALANCED, N_HEADS, DIM, TOKENS, Calibrated(matrices))
    first = error(codec, pages_of())[:, 1:, :, 0].square().mean((0, 1))
    assert first[1] < 0.1 * first[0]


def test_a_token_is_read_the_same_alone_and_among_others() -> None:
    matrices = torch.randn(N_HEADS, DIM, DIM, generator=torch.Generator().manual_seed(1))
    codec, pages = Codec(BALANCED, N_HEADS, DIM, TOKENS, Calibrated(matrices)), pages_of()
    assert torch.equal(error(codec, pages)[3:4], error(codec, pages[3:4]))


def test_balanced_keys_without_matrices_are_refused() -> None:
    with pytest.raises(ShapeError, match="kvcfg calibrate"):
        Codec(BALANCED, N_HEADS, DIM, TOKENS)


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("granularity", "expected"), [("head", (4.0, 100.0)), ("tensor", (100.0, 100.0))])
def test_static_scales_reach_the_calibrated_magnitude(
    name: str, granularity: Granularity, expected: tuple[float, float]
) -> None:
    side = SideRecipe(FORMATS[name], granularity, None, DType.float32)
    codec = Codec(side, N_HEADS, DIM, calibrated=Calibrated(amax=torch.tensor([4.0, 100.0])))
    read = codec.decode(codec.encode(torch.full((1, N_HEADS, DIM), 1000.0)), torch.float32)
    torch.testing.assert_close(read[0, :, 0], torch.tensor(expected))


def test_numbers_beyond_static_scales_are_counted() -> None:
    side = SideRecipe(FORMATS["int8"], "head", None, DType.float32)
    codec = Codec(side, N_HEADS, DIM, calibrated=Calibrated(amax=torch.ones(N_HEADS)))
    numbers = torch.zeros(10, N_HEADS, DIM)
    numbers[:3, 1, 5] = -1.5
    codec.encode(numbers)
    assert clip_rate([codec]) == 3 / numbers.numel()


def test_scales_that_follow_the_numbers_cut_nothing_off() -> None:
    codec = Codec(SideRecipe(FORMATS["int8"], "token_head", None, DType.float32), N_HEADS, DIM)
    codec.encode(torch.randn(10, N_HEADS, DIM) * 1e6)
    assert clip_rate([codec]) == 0
