"""Keys less the mean of their page, with sinks kept apart."""

from __future__ import annotations

import pytest
import torch

from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError
from kvcfg.formats import FORMATS, SideRecipe, Transform
from kvcfg.formats.codec import Codec

TOKENS, N_HEADS, DIM = 32, 2, 32


def codec(transform: Transform = "centred", sink_tokens: int = 1, name: str = "gauss4") -> Codec:
    side = SideRecipe(FORMATS[name], "token_head", None, DType.float16, transform, sink_tokens)
    return Codec(side, N_HEADS, DIM, TOKENS)


def error(stored: Codec, pages: torch.Tensor) -> torch.Tensor:
    return (stored.decode(stored.encode(pages), torch.float32) - pages).square()


def pages_of(mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = mean * torch.randn(3, 1, N_HEADS, DIM, generator=generator)
    return torch.randn(3, TOKENS, N_HEADS, DIM, generator=generator) + means


def test_what_a_page_has_in_common_costs_nothing() -> None:
    lone, common = pages_of(), pages_of() + 8 * torch.randn(1, 1, N_HEADS, DIM)
    assert error(codec(), common).mean() == pytest.approx(error(codec(), lone).mean().item(), rel=0.02)
    assert error(codec("hadamard", 0), common).mean() > 10 * error(codec(), common).mean()


def test_a_sink_leaves_all_others_as_they_are() -> None:
    pages = pages_of(mean=4)
    with_sink = pages.clone()
    with_sink[:, 0] *= 1000
    assert torch.equal(error(codec(), with_sink)[:, 1:], error(codec(), pages)[:, 1:])


@pytest.mark.parametrize("sink_tokens", [1, 4])
def test_sinks_are_read_as_int8_stores_them(sink_tokens: int) -> None:
    pages = pages_of(mean=4)
    stored = codec(sink_tokens=sink_tokens, name="gauss2")
    sinks = error(stored, pages)[:, :sink_tokens].mean(-1).sqrt()
    assert (sinks <= pages[:, :sink_tokens].norm(dim=-1) / 127 / 2).all()
    assert error(stored, pages)[:, sink_tokens:].mean() > 100 * error(stored, pages)[:, :sink_tokens].mean()


def test_a_poisoned_token_has_no_part_in_the_mean() -> None:
    pages = pages_of(mean=4)
    poisoned = pages.clone()
    poisoned[1, 5, 0, 3], poisoned[1, 6, 0, 4] = torch.nan, torch.inf
    read = codec().decode(codec().encode(poisoned), torch.float32)
    read[1, 5:7, 0] = pages[1, 5:7, 0]
    assert ((read - pages).square().mean() < 1.5 * error(codec(), pages).mean()).all()


def test_a_page_of_poison_is_read_without_harm_to_the_next() -> None:
    pages = pages_of()
    pages[1] = torch.nan
    read = codec().decode(codec().encode(pages), torch.float32)
    assert read[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("side", "tokens", "key"),
    [
        (SideRecipe(FORMATS["gauss4"], "token_head", None, DType.float16, "centred"), None, "transform"),
        (SideRecipe(FORMATS["gauss4"], "token_head", None, DType.float16, "centred", 32), 32, "sink_tokens"),
        (SideRecipe(FORMATS["gauss4"], "channel", None, DType.float16, "centred"), 32, "granularity"),
        (SideRecipe(FORMATS["bfloat16"], "none", None, DType.float16, "centred"), 32, "granularity"),
        (SideRecipe(FORMATS["gauss4"], "token_head", None, DType.float8_e8m0fnu, "centred"), 32, "scale_dtype"),
    ],
)
def test_what_cannot_be_centred_is_refused(side: SideRecipe, tokens: int | None, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Codec(side, N_HEADS, DIM, tokens)
    assert [problem.key for problem in caught.value.problems] == [key]
