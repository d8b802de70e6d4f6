"""Attention over latents as they are stored gives what attention over expanded keys and values gives."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from kvcfg.integrations import paged_attention
from kvcfg.integrations.latent_attention import absorbs
from kvcfg.kernels.cpu.loader import load_kernel
from tests.integrations.cache_contract.models import Tiny, prompts, tiny

FAMILY = "deepseek-v3, latents"
compiled = pytest.mark.skipif(load_kernel("pages") is None, reason="there is no compiler")


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of every layer that was computed among latents."""
    counted: list[int] = []
    attend_latents = paged_attention.attend_latents

    def counting(module: object, query: torch.Tensor, *args: object) -> torch.Tensor:
        counted.append(query.shape[2])
        return attend_latents(module, query, *args)

    monkeypatch.setattr(paged_attention, "attend_latents", counting)
    return counted


@torch.no_grad()
def logits(model: Tiny, recipe: str, *sizes: int) -> torch.Tensor:
    cache = model.cache(f"cache.kv_cache_format={recipe}")
    pieces = prompts(2, sum(sizes)).split(sizes, dim=1)
    return torch.cat([model.model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)


@compiled
@pytest.mark.parametrize(("recipe", "rounding"), [("float32", 1e-5), ("int8", 2e-2), ("float8_e4m3fn", 2e-2)])
def test_absorbed_steps_give_the_logits_of_expanded_ones(recipe: str, rounding: float, absorbed: list[int]) -> None:
    model = tiny(FAMILY)
    model.set_attention("kvcfg")
    got = logits(model, recipe, 37, 1, 5)
    assert absorbed == [37, 37, 1, 1, 5, 5]
    model.set_attention("gathered")
    expected = logits(model, recipe, 37, 1, 5)
    assert (got - expected).norm() < rounding * expected.norm()


def test_layers_that_expand_otherwise_are_not_absorbed(absorbed: list[int]) -> None:
    original = tiny(FAMILY)
    model = Tiny(copy.deepcopy(original.model), original.folder)
    model.set_attention("gathered")
    for layer in model.model.model.layers:
        attention = layer.self_attn
        attention.kv_b_proj.bias = torch.nn.Parameter(torch.ones(attention.kv_b_proj.out_features))
    expected = logits(model, "float32", 37, 1)
    model.set_attention("kvcfg")
    torch.testing.assert_close(logits(model, "float32", 37, 1), expected, rtol=1e-4, atol=1e-4)
    assert not absorbed


def test_a_copied_model_uses_its_own_weights() -> None:
    original = tiny(FAMILY)
    original.cache()
    model = copy.deepcopy(original.model)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.kv_b_proj.weight.zero_()
    assert absorbs(attention, torch.randn(1, 4, 1, 32))
    keys, _ = attention.expand_kv(torch.randn(1, 1, 3, 32), torch.zeros(1, 1, 3, 16))
    assert not keys.any()


def test_models_compute_the_same_with_other_caches_after_they_were_handed_over() -> None:
    model = tiny(FAMILY)
    model.cache()
    model.set_attention("kvcfg")
    with torch.no_grad():
        got = model.model(prompts(), past_key_values=model.dynamic(), use_cache=True).logits
        model.set_attention("gathered")
        assert torch.equal(got, model.model(prompts(), use_cache=False).logits)
