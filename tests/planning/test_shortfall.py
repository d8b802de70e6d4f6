from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcfg.composition import compose
from kvcfg.planning import Plan, plan

Planned = Callable[..., Plan]

WORDS = [
    ("model=llama-3.1-8b", "devices=rtx4090", "workload.max_batch_size=8", "workload.max_seq_len=8192"),
    ("model=llama-3.1-8b", "devices=h100", "workload=rag", "cache.kv_cache_memory_bytes=4GiB"),
    ("model=gemma-3-27b", "devices=h100", "workload=rag"),
    ("model=llama-4-scout", "devices=h100x8"),
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_correction_makes_it_fit(planned: Planned, words: tuple[str, ...]) -> None:
    lack = planned(*words).shortfall
    assert lack is not None
    assert lack.overrides
    for override in lack.overrides:
        assert plan(compose([*words, override])).fits, override


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_missing_bytes_are_enough_and_one_less_is_not(planned: Planned, words: tuple[str, ...]) -> None:
    asked = planned(*words)
    lack = asked.shortfall
    assert lack is not None
    tp = asked.resolution.params.tensor_parallel_degree
    needed = asked.capacity.needed.total
    assert (lack.has + lack.missing) * tp >= needed > (lack.has + lack.missing - 1) * tp


def test_nothing_is_missing_where_it_fits(planned: Planned) -> None:
    assert planned("model=llama-3.1-8b", "devices=h100x8").shortfall is None


def test_no_correction_is_offered_where_the_weights_do_not_fit(planned: Planned) -> None:
    lack = planned("model=llama-3.1-405b", "devices=rtx4090").shortfall
    assert lack is not None
    assert lack.overrides == ()


def test_message_says_why_how_much_and_what_would_help(planned: Planned) -> None:
    message = str(planned(*WORDS[0]).shortfall)
    assert message == (
        "does not fit: weights take 15 GiB of a device and 8 sequences of 8,192 tokens 8.02 GiB; 21.6 GiB may be used; "
        "1.37 GiB missing. "
        "Try: workload.max_seq_len=6784 or workload.max_batch_size=6 or cache.device_memory_utilization=0.958"
    )
