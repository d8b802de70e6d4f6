"""Tokens to the first divergence are counted where it is, and rounding is told from loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.evaluation.free_running import Choices, Divergence, continuation, first_divergence, greedy
from kvcfg.evaluation.quality import CacheMaker, full_precision
from kvcfg.integrations.transformers import TransformersCache

transformers = pytest.importorskip("transformers")

VOCABULARY, PROMPT, NEW = 97, 40, 24


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (6, PROMPT), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(model: Any, prompts: torch.Tensor) -> Choices:
    return continuation(model, prompts, full_precision, NEW, batch_size=6)


def pages(model: Any, folder: Path, *overrides: str) -> CacheMaker:
    model.config.save_pretrained(folder)
    sizes = ["devices=cpu", "workload.max_batch_size=6", f"workload.max_seq_len={PROMPT + NEW - 1}"]
    experiment = kvcfg.compose(["model=hf", f"model.path={folder}", "cache.kv_cache_page_size=16", *sizes, *overrides])
    built = kvcfg.build(experiment, model)

    def empty(batch_size: int) -> TransformersCache:
        built.release()
        return TransformersCache(built)

    return empty


def blank_after(length: int) -> CacheMaker:
    """Full precision, but nothing that is stored after so many tokens can be read."""

    class Broken(transformers.DynamicCache):
        def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(keys, values, layer, *args, **kwargs)
            if keys.shape[2] > length:
                values = torch.zeros_like(values)
            return keys, values

    return lambda batch_size: Broken()


def test_float32_pages_never_diverge(model: Any, prompts: torch.Tensor, reference: Choices, tmp_path: Path) -> None:
    float32 = pages(model, tmp_path, "cache.kv_cache_format=float32")
    found = first_divergence(model, prompts, float32, reference, batch_size=6)
    assert found.tokens.tolist() == [NEW] * 6
    assert (found.never, found.num_ties) == (1.0, 0)


def test_greedy_answers_are_those_of_generate(model: Any, prompts: torch.Tensor, reference: Choices) -> None:
    answers = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert torch.equal(reference.tokens, answers[:, PROMPT:])


def test_a_cache_that_breaks_diverges_where_it_breaks(model: Any, prompts: torch.Tensor, reference: Choices) -> None:
    found = first_divergence(model, prompts, blank_after(PROMPT + 9), reference)
    # The prompt's step chooses the first token, and each step after it one more.
    assert found.tokens.tolist() == [10] * 6


def test_closing_pages_are_fed_page_by_page_and_lose_more_with_fewer_bits(
    model: Any, prompts: torch.Tensor, reference: Choices, tmp_path: Path
) -> None:
    means = [
        first_divergence(model, prompts, pages(model, tmp_path, f"quantization={name}"), reference).mean
        for name in ("bits8", "bits2")
    ]
    assert means[0] > means[1]


def test_batches_of_prompts_give_what_single_ones_give(
    model: Any, prompts: torch.Tensor, reference: Choices, tmp_path: Path
) -> None:
    bits3 = pages(model, tmp_path, "quantization=bits3")
    counts = [first_divergence(model, prompts, bits3, reference, batch_size=size).tokens.tolist() for size in (1, 4, 6)]
    assert min(counts[0]) < NEW
    assert counts[0] == counts[1] == counts[2]


def scripted(*steps: list[float]) -> Any:
    """A model of three tokens whose logits are as written, whatever it reads."""
    remaining = iter(steps)

    def forward(tokens: torch.Tensor, **options: Any) -> Any:
        return SimpleNamespace(logits=torch.tensor(next(remaining)).expand(len(tokens), 1, 3))

    forward.device = torch.device("cpu")  # type: ignore[attr-defined]
    return forward


@pytest.mark.parametrize(("margin", "tied"), [(5e-5, True), (5e-4, False)])
def test_a_difference_at_two_equal_logits_is_a_tie(margin: float, tied: bool) -> None:
    prompt = torch.tensor([[1, 2]])
    reference = continuation(scripted([2.0, 0, 0], [0, 1e-3 + margin, 1e-3], [2.0, 0, 0]), prompt, full_precision, 3)
    candidate = scripted([2.0, 0, 0], [0, 1e-3, 1e-3 + margin], [2.0, 0, 0])
    found = first_divergence(candidate, prompt, full_precision, reference)
    assert (found.tokens.tolist(), found.tied.tolist()) == ([1], [tied])


def test_an_answer_that_never_differs_is_no_tie_whatever_its_margins() -> None:
    prompt = torch.tensor([[1, 2]])
    close = [0.0, 1e-6, 0.0]
    reference = continuation(scripted(close, close), prompt, full_precision, 2)
    found = first_divergence(scripted(close, close), prompt, full_precision, reference)
    assert (found.never, found.num_ties) == (1.0, 0)


def test_generation_stops_once_every_answer_differs() -> None:
    prompt = torch.tensor([[1, 2]])
    reference = Choices(torch.tensor([[0, 0, 0]]), torch.ones(1, 3))
    # The script ends with the difference: one more step would fail.
    found = first_divergence(scripted([2.0, 0, 0], [0, 2.0, 0]), prompt, full_precision, reference)
    assert found.tokens.tolist() == [1]


def test_no_step_is_taken_for_tokens_that_nobody_asks_for() -> None:
    steps: Iterator[Choices] = greedy(scripted([2.0, 0, 0], [0, 2.0, 0]), torch.tensor([[1]]), full_precision)
    assert [step.tokens.item() for step in islice(steps, 2)] == [0, 1]


def test_the_interval_of_the_mean_is_over_prompts() -> None:
    tokens = torch.tensor([0, 64]).repeat(32)
    found = Divergence(tokens, torch.zeros(64, dtype=torch.bool), 64)
    low, high = found.mean_interval()
    assert (found.mean, found.median, found.never) == (32.0, 32.0, 0.5)
    assert 22 < low < 26 and 38 < high < 42
