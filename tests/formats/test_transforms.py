"""The Hadamard transform of a head."""

from __future__ import annotations

import pytest
import torch

from kvcfg.formats.transforms import Hadamard

DIMS = pytest.mark.parametrize(("dim", "width"), [(8, 8), (64, 64), (128, 128), (80, 16), (96, 32), (24, 8), (7, 1)])


@DIMS
def test_it_undoes_itself(dim: int, width: int) -> None:
    numbers = torch.randn(100, 3, dim, generator=torch.Generator().manual_seed(0))
    hadamard = Hadamard(dim)
    torch.testing.assert_close(hadamard.apply(hadamard.apply(numbers)), numbers, rtol=1e-5, atol=1e-5)


@DIMS
def test_it_spreads_one_number_evenly_over_its_run(dim: int, width: int) -> None:
    numbers = torch.zeros(1, dim)
    numbers[0, width - 1] = 1.0
    turned = Hadamard(dim).apply(numbers)[0]
    assert turned[:width].abs().tolist() == pytest.approx([width**-0.5] * width)
    assert (turned[width:] == 0).all()


@DIMS
def test_products_of_turned_heads_are_those_of_the_heads(dim: int, width: int) -> None:
    keys, queries = torch.randn(2, 50, dim, generator=torch.Generator().manual_seed(0))
    hadamard = Hadamard(dim)
    turned = hadamard.apply(queries) @ hadamard.apply(keys).T
    torch.testing.assert_close(turned, queries @ keys.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_a_token_is_turned_the_same_alone_and_among_others(dim: int) -> None:
    numbers = torch.randn(1000, dim, generator=torch.Generator().manual_seed(0))
    hadamard = Hadamard(dim)
    together = hadamard.apply(numbers)
    for count in (1, 2, 3, 7, 64, 65, 999):
        assert torch.equal(hadamard.apply(numbers[:count]), together[:count])


def test_nan_stays_in_its_run() -> None:
    numbers = torch.zeros(2, 24)
    numbers[0, 9] = torch.nan
    turned = Hadamard(24).apply(numbers)
    assert turned[0, 8:16].isnan().all()
    assert turned[0, :8].isfinite().all() and turned[0, 16:].isfinite().all() and turned[1].isfinite().all()
