"""The closed form: keys and queries become equally large in every direction, and that costs scores least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcfg.evaluation.key_balance import balancing_root, gained_bits, hadamard, key_transforms, score_error

N_HEADS, DIM = 3, 16


def moments_of(seed: int, spread: float = 2.0) -> Tensor:
    """Second moments of correlated numbers whose directions differ by orders of magnitude."""
    chooser = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(N_HEADS, DIM, DIM, generator=chooser, dtype=torch.float64)).Q
    sizes = 10 ** (spread * torch.rand(N_HEADS, DIM, generator=chooser, dtype=torch.float64))
    return (turns * sizes.unsqueeze(-2)) @ turns.mT


def test_both_moments_become_the_same_matrix() -> None:
    keys, queries = moments_of(0), moments_of(1)
    root = balancing_root(keys, queries)
    inverse = torch.linalg.inv(root)
    torch.testing.assert_close(root @ keys @ root, inverse @ queries @ inverse, rtol=1e-9, atol=1e-9)


def test_root_is_symmetric_and_positive() -> None:
    root = balancing_root(moments_of(0), moments_of(1))
    torch.testing.assert_close(root, root.mT, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(root).min() > 0


def test_keys_that_are_like_their_queries_are_left_alone() -> None:
    keys = moments_of(0)
    one = torch.eye(DIM, dtype=torch.float64).expand_as(keys)
    torch.testing.assert_close(balancing_root(keys, keys), one, rtol=1e-9, atol=1e-9)


def test_error_is_the_least_there_can_be() -> None:
    keys, queries = moments_of(0), moments_of(1)
    best = score_error(keys, queries, balancing_root(keys, queries))
    chooser = torch.Generator().manual_seed(2)
    for _ in range(20):
        changed = balancing_root(keys, queries) @ (torch.eye(DIM) + 0.05 * torch.randn(DIM, DIM, generator=chooser)).to(
            keys
        )
        assert (score_error(keys, queries, changed) > best).all()


def test_keys_that_were_scaled_beforehand_end_at_the_same_error() -> None:
    # RoPE-pair balancing does that: factors on keys, undone in the queries that read them.
    keys, queries = moments_of(0), moments_of(1)
    factors = 10 ** torch.rand(DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    other_keys, other_queries = keys * factors * factors[:, None], queries / factors / factors[:, None]
    before, after = (
        score_error(key_side, query_side, balancing_root(key_side, query_side))
        for key_side, query_side in ((keys, queries), (other_keys, other_queries))
    )
    torch.testing.assert_close(before, after, rtol=1e-8, atol=0)


def test_error_is_that_of_scores_that_are_computed() -> None:
    # Errors as large as the stored numbers, even over channels: what a scale per token does after a Hadamard matrix.
    chooser = torch.Generator().manual_seed(3)
    keys, queries = moments_of(0)[:1], moments_of(1)[:1]
    transforms = key_transforms(keys, queries)
    noise, readers = (torch.randn(200_000, DIM, generator=chooser, dtype=torch.float64) for _ in range(2))
    ratios = []
    for matrix in (transforms, hadamard(DIM)[None]):
        size = (matrix.mT @ keys @ matrix)[0].trace() / DIM
        errors = noise * size.sqrt() @ torch.linalg.inv(matrix[0])
        ratios.append((errors * (readers @ torch.linalg.cholesky(queries[0]).mT)).sum(1).square().mean())
    measured = (ratios[1] / ratios[0]).log2() / 2
    assert gained_bits(keys, queries, transforms).item() == pytest.approx(measured.item(), abs=0.02)


def test_hadamard_follows_so_that_stored_channels_are_equally_large() -> None:
    keys, queries = (torch.diag_embed(moments_of(seed).diagonal(dim1=-2, dim2=-1).pow(3)) for seed in (0, 1))
    transforms = key_transforms(keys, queries)
    sizes = (transforms.mT @ keys @ transforms).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(sizes, sizes.mean(-1, keepdim=True).expand_as(sizes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [8, 12, 7])
def test_hadamard_of_every_width_is_orthonormal(dim: int) -> None:
    matrix = hadamard(dim)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_directions_that_were_never_seen_stay_sane() -> None:
    keys, queries = moments_of(0), moments_of(1)
    keys[:, 0], keys[:, :, 0] = 0, 0
    transforms = key_transforms(keys, queries)
    values = torch.linalg.svdvals(transforms)
    assert transforms.isfinite().all() and (values.amax(-1) / values.amin(-1)).max() < 1e4


@pytest.mark.parametrize("side", [0, 1])
def test_head_without_energy_gets_hadamard_alone(side: int) -> None:
    moments = [moments_of(0), moments_of(1)]
    moments[side][1] = 0
    transforms = key_transforms(*moments)
    torch.testing.assert_close(transforms[1], hadamard(DIM), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(transforms[0], hadamard(DIM), atol=0.1)
    assert gained_bits(*moments, transforms)[1] == 0


def test_gain_is_one_bit_where_scores_are_disturbed_half_as_much() -> None:
    # Keys and queries along different channels: sizes 16 and 1, and the other way round.
    sizes = torch.tensor([16.0, 1.0], dtype=torch.float64).square()
    keys, queries = torch.diag(sizes)[None], torch.diag(sizes.flip(0))[None]
    expected = (torch.tensor(257.0) / 32).log2()
    transforms = balancing_root(keys, queries)
    assert gained_bits(keys, queries, transforms).item() == pytest.approx(expected.item(), rel=1e-6)
