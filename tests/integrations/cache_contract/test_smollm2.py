"""The same with a real model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kvcfg

pytestmark = pytest.mark.model

PROMPTS = ["A sequence: 1, 2, 3, 4, 5, 6, 7, 8,", "A sequence: A, B, C, D, E, F, G, H,"]
WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "beams": {"num_beams": 2},
    "sampled": {"do_sample": True, "top_k": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = kvcfg.load(kvcfg.compose([]))
    tokenizer.padding_side = "left"
    return model, tokenizer


def cache_of(model: Any, *overrides: str) -> Any:
    sizes = ["workload.max_batch_size=4", "workload.max_seq_len=256"]
    return kvcfg.TransformersCache(kvcfg.build(kvcfg.compose([*sizes, *overrides]), model))


def answer(model: Any, tokenizer: Any, cache: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    tokens: torch.Tensor = model.generate(**inputs, past_key_values=cache, **settings)
    return tokens


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_dynamic_cache(loaded: tuple[Any, Any], way: str) -> None:
    prompts = PROMPTS[:1] if way == "prompt lookup" else [*PROMPTS[:1], "Hello,"]
    expected = answer(*loaded, None, prompts, **WAYS[way])
    ours = answer(*loaded, cache_of(loaded[0], "cache.kv_cache_format=float32"), prompts, **WAYS[way])
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("recipe", ["cache=int8", "quantization=bits4"])
def test_a_batch_goes_on_as_transformers_own_test_expects(loaded: tuple[Any, Any], recipe: str) -> None:
    answers = answer(*loaded, cache_of(loaded[0], recipe), ["A sequence: 1, 2, 3, 4, 5", "A sequence: A, B, C"])
    texts = loaded[1].batch_decode(answers, skip_special_tokens=True)
    assert [text[: len(start)] for text, start in zip(texts, PROMPTS, strict=True)] == PROMPTS


def test_a_copied_prefix_goes_on_with_different_prompts(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prefix, cache = "You are a helpful assistant.", cache_of(model, "cache.kv_cache_format=float32")
    with torch.no_grad():
        model(**tokenizer(prefix, return_tensors="pt"), past_key_values=cache, use_cache=True)
    for prompt in (" Say hello.", " Count to five."):
        expected = answer(model, tokenizer, None, [prefix + prompt])
        assert torch.equal(answer(model, tokenizer, copy.deepcopy(cache), [prefix + prompt]), expected)


def test_a_prompt_of_several_pages_needs_no_chunks(loaded: tuple[Any, Any]) -> None:
    prompt = " ".join(str(number) for number in range(60))
    whole, chunked = (
        answer(*loaded, cache_of(loaded[0], "quantization=bits4"), [prompt], **options)
        for options in ({}, {"prefill_chunk_size": 64})
    )
    assert torch.equal(whole, chunked)
