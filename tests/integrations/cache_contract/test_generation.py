"""Every way of generating gives token for token what DynamicCache gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.integrations.cache_contract.models import FAMILIES, Tiny, generate, padded, prompts, tiny


def resumed(model: Tiny, cache: Any) -> torch.Tensor:
    """A second call goes on with what the first one gave."""
    return generate(model, cache, generate(model, cache, prompts()))


def copied(model: Tiny, cache: Any) -> torch.Tensor:
    """Two copies of a prefix go on with different prompts, then the original."""
    tokens, other = prompts(), prompts()
    other[:, 30:] = 5
    with torch.no_grad():
        model.model(tokens[:, :30], past_key_values=cache, use_cache=True)
    caches = copy.deepcopy(cache), copy.deepcopy(cache), cache
    answers = [generate(model, item, asked) for item, asked in zip(caches, (tokens, other, tokens), strict=True)]
    return torch.cat(answers)


def drafted(model: Tiny, cache: Any) -> torch.Tensor:
    """A draft model of its own, with transformers' cache."""
    return generate(model, cache, prompts(1), assistant_model=tiny("llama", seed=1).model)


WAYS: dict[str, Callable[[Tiny, Any], torch.Tensor]] = {
    "greedy": lambda model, cache: generate(model, cache, prompts()),
    "sampled": lambda model, cache: generate(model, cache, prompts(), do_sample=True, top_k=10),
    "several sequences": lambda model, cache: generate(model, cache, prompts(), do_sample=True, num_return_sequences=3),
    "left padding": lambda model, cache: generate(model, cache, prompts(), attention_mask=padded("left")),
    "right padding": lambda model, cache: generate(model, cache, prompts(), attention_mask=padded("right")),
    "beams": lambda model, cache: generate(
        model, cache, prompts(), num_beams=3, num_return_sequences=2, attention_mask=padded("left")
    ),
    "sampled beams": lambda model, cache: generate(model, cache, prompts(), num_beams=3, do_sample=True),
    "draft model": drafted,
    "a perfect drafter": lambda model, cache: generate(model, cache, prompts(1), assistant_model=model.model),
    "prompt lookup": lambda model, cache: generate(model, cache, prompts(1), prompt_lookup_num_tokens=6),
    "chunked prefill": lambda model, cache: generate(model, cache, prompts(), prefill_chunk_size=5),
    "resumed": resumed,
    "copied prefix": copied,
}
FEW = ["llama", "gemma 3", "deepseek-v3, latents"]


@lru_cache(maxsize=200)
def of_dynamic_cache(family: str, way: str) -> torch.Tensor:
    model = tiny(family)
    model.set_attention("gathered")
    return WAYS[way](model, model.dynamic())


@pytest.mark.parametrize(
    ("family", "attention"), [*[(family, "kvcfg") for family in FAMILIES], *[(family, "gathered") for family in FEW]]
)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_dynamic_cache(family: str, way: str, attention: str) -> None:
    expected = of_dynamic_cache(family, way)
    model = tiny(family)
    model.set_attention(attention)
    cache = model.cache()
    assert torch.equal(WAYS[way](model, cache), expected)
    cache.pages.replica.check_integrity()


@pytest.mark.parametrize("way", ["greedy", "left padding", "beams", "prompt lookup", "copied prefix"])
@pytest.mark.parametrize("family", FEW)
def test_bfloat16_models_give_the_tokens_of_dynamic_cache(family: str, way: str) -> None:
    original = tiny(family)
    model = Tiny(copy.deepcopy(original.model).bfloat16(), original.folder)
    model.set_attention("gathered")
    expected = WAYS[way](model, model.dynamic())
    assert torch.equal(WAYS[way](model, model.cache("cache.kv_cache_format=bfloat16")), expected)


def test_beams_share_the_pages_that_are_full() -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    cache = model.cache()
    tokens = prompts(1, 37).expand(4, -1)
    with torch.no_grad():
        model.model(tokens, past_key_values=cache, use_cache=True)
    alone = cache.pages.replica.ledger.metrics().used_pages
    cache.reorder_cache(torch.tensor([2, 2, 2, 0]))
    # Three beams go on from one sequence: two full pages are theirs together, the third is copied.
    assert (alone, cache.pages.replica.ledger.metrics().used_pages) == (4 * 3, 2 * 2 + 4)
