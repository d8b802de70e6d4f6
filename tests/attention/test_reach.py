"""Which tokens each query sees."""

from __future__ import annotations

import pytest
import torch

from kvcfg.attention import Reach, causal
from kvcfg.errors import ShapeError


def pairs(reach: Reach) -> list[tuple[int, int]]:
    return list(zip(reach.first.tolist(), reach.stop.tolist(), strict=True))


def test_queries_of_a_ragged_batch_see_up_to_their_own_token() -> None:
    reach = causal([4, 0], [1, 3])
    assert reach.query_starts.tolist() == [0, 1, 4]
    assert pairs(reach) == [(0, 5), (0, 1), (0, 2), (0, 3)]


def test_sliding_window_moves_along() -> None:
    assert pairs(causal([3], [4], 5)) == [(0, 4), (0, 5), (1, 6), (2, 7)]


def test_chunks_begin_at_multiples_of_the_window() -> None:
    assert pairs(causal([3], [4], 5, chunked=True)) == [(0, 4), (0, 5), (5, 6), (5, 7)]


def test_skipped_tokens_leave_padding_nothing_to_see() -> None:
    reach = causal([0], [4], skip=[2])
    assert (reach.stop > reach.first).tolist() == [False, False, True, True]
    assert pairs(reach)[2:] == [(2, 3), (2, 4)]


def test_numbers_are_int32_as_kernels_read_them() -> None:
    reach = causal([1, 2], [1, 2], 2, skip=[1, 0])
    assert {reach.query_starts.dtype, reach.first.dtype, reach.stop.dtype} == {torch.int32}


def test_skip_of_another_batch_is_refused() -> None:
    with pytest.raises(ShapeError, match="the same sequences, got 2, 2 and 1"):
        causal([1, 2], [1, 2], skip=[1])
