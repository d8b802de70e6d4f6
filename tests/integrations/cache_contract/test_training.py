"""A forward with gradients that fills the cache: new keys and values are read as stored, gradients pass straight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integrations.cache_contract.models import FAMILIES, Tiny, prompts, tiny


def gradients(model: Tiny, cache: Any) -> torch.Tensor:
    """Of the loss by all weights."""
    tokens = prompts()
    model.model.zero_grad()
    model.model(tokens, labels=tokens, past_key_values=cache, use_cache=cache is not None).loss.backward()
    found = [parameter.grad.flatten() for parameter in model.model.parameters() if parameter.grad is not None]
    model.model.zero_grad()
    return torch.cat(found)


@pytest.mark.parametrize("attention", ["kvcfg", "gathered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_gradients_are_those_without_a_cache(family: str, attention: str) -> None:
    model = tiny(family)
    model.set_attention(attention)
    torch.testing.assert_close(gradients(model, model.cache()), gradients(model, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["cache.kv_cache_format=int8", "quantization=bits4"])
def test_quantized_gradients_point_where_exact_ones_do(recipe: str) -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    exact, stored = gradients(model, None), gradients(model, model.cache(recipe))
    assert not torch.equal(stored, exact)
    assert torch.cosine_similarity(stored, exact, dim=0) > 0.9


def test_the_loss_is_that_of_what_is_stored() -> None:
    model = tiny("llama")
    model.set_attention("gathered")
    with torch.no_grad():
        plain = model.model(prompts(), past_key_values=model.cache("cache.kv_cache_format=int8"), use_cache=True)
    trained = model.model(prompts(), past_key_values=model.cache("cache.kv_cache_format=int8"), use_cache=True)
    torch.testing.assert_close(trained.logits, plain.logits, rtol=1e-5, atol=1e-5)


def test_tokens_of_earlier_steps_pass_no_gradients_on() -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    cache = model.cache()
    keys, values = torch.randn(2, 1, 2, 5, 32, requires_grad=True)
    cache.update(keys, values, 0)
    cache.update(keys, values, 1)
    newer = torch.randn(2, 1, 2, 1, 32, requires_grad=True)
    seen, _ = cache.update(newer[0], newer[1], 0)
    seen.sum().backward()
    assert torch.equal(newer.grad[0], torch.ones(1, 2, 1, 32))
