"""Quantized formats go through every way of generating; where pages close, whole prompts are fed page after page."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from kvcfg.errors import ShapeError
from tests.integrations.cache_contract.models import PAGE, Tiny, generate, prompts, tiny
from tests.integrations.cache_contract.test_generation import WAYS

RECIPES = {
    "int8": ["cache.kv_cache_format=int8"],
    "float8_e4m3fn": ["cache.kv_cache_format=float8_e4m3fn"],
    "4 bits": ["quantization=bits4", "quantization.experimental=true"],
    "2 bits": ["quantization=bits2", "quantization.experimental=true"],
}
CLOSING = ["4 bits", "2 bits"]
FEW = ["llama", "mistral, window", "gemma 3", "gpt-oss, sinks", "deepseek-v3, latents"]
PAIRS = [
    *[("llama", recipe) for recipe in RECIPES],
    ("mistral, window", "int8"),
    ("gemma 3", "4 bits"),
    ("gpt-oss, sinks", "2 bits"),
    ("deepseek-v3, latents", "float8_e4m3fn"),
    ("deepseek-v3, latents", "4 bits"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "recipe"), PAIRS)
def test_every_way_of_generating_goes_through(family: str, way: str, recipe: str) -> None:
    model = tiny(family)
    model.set_attention("kvcfg")
    cache = model.cache(*RECIPES[recipe])
    answers = WAYS[way](model, cache)
    assert answers.shape[1] == prompts().shape[1] + (24 if way == "resumed" else 12)
    cache.pages.replica.check_integrity()


@pytest.mark.parametrize("way", ["draft model", "prompt lookup"])
@pytest.mark.parametrize("recipe", ["int8", "float8_e4m3fn"])
def test_drafts_do_not_change_what_is_generated(recipe: str, way: str) -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    plain = generate(model, model.cache(*RECIPES[recipe]), prompts(1))
    assert torch.equal(WAYS[way](model, model.cache(*RECIPES[recipe])), plain)


def logits(model: Tiny, cache: Any, size: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    tokens = prompts(2, 60)
    pieces = []
    with torch.no_grad():
        for start in range(0, 60, size):
            stop = min(start + size, 60)
            seen = {} if mask is None else {"attention_mask": mask[:, :stop]}
            pieces.append(model.model(tokens[:, start:stop], past_key_values=cache, use_cache=True, **seen).logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("padding", ["none", "left", "middle"])
@pytest.mark.parametrize("recipe", CLOSING)
@pytest.mark.parametrize("family", FEW)
def test_a_whole_prompt_gives_what_pages_of_it_give(family: str, recipe: str, padding: str) -> None:
    """In float64, gathered, so that no rounding of the model itself moves a number across a quantization step."""
    original = tiny(family)
    model = Tiny(type(original.model)(original.model.config).eval().double(), original.folder)
    model.set_attention("kvcfg")
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, {"none": slice(0), "left": slice(0, 20), "middle": slice(18, 20)}[padding]] = 0
    whole = logits(model, model.cache(*RECIPES[recipe]), 60, mask)
    for size in (1, PAGE, 23):
        pieces = logits(model, model.cache(*RECIPES[recipe]), size, mask)
        torch.testing.assert_close(whole[mask.bool()], pieces[mask.bool()], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", CLOSING)
def test_kernels_read_a_whole_prompt_as_they_read_its_pages(recipe: str) -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    whole, pages = (logits(model, model.cache(*RECIPES[recipe]), size) for size in (60, PAGE))
    assert (whole - pages).norm() < 1e-4 * pages.norm()


def test_masks_of_ones_own_are_cut_for_the_pages_of_a_prompt() -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    causal = torch.ones(2, 1, 60, 60, dtype=torch.bool).tril()
    hiding = causal.clone()
    hiding[:, :, 30:, 7] = False
    with torch.no_grad():
        got, expected = (
            model.model(
                prompts(2, 60), attention_mask=mask, past_key_values=model.cache(*RECIPES["4 bits"]), use_cache=True
            ).logits
            for mask in (hiding, causal)
        )
    assert torch.equal(got[:, :30], expected[:, :30])
    assert (got[:, 30:] - expected[:, 30:]).abs().max() > 1e-2


def test_weights_of_a_whole_prompt_are_given_where_the_model_has_them() -> None:
    model = tiny("gemma 2, soft cap")
    model.set_attention("kvcfg")
    with torch.no_grad():
        cache = model.cache(*RECIPES["4 bits"])
        given = model.model(prompts(2, 60), past_key_values=cache, use_cache=True, output_attentions=True).attentions
    assert given[1].shape == (2, 4, 60, 60)
    torch.testing.assert_close(given[1].sum(-1), torch.ones(2, 4, 60), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3, latents"])
def test_attention_that_cannot_go_from_page_to_page_is_told_what_can(family: str) -> None:
    model = tiny(family)
    model.set_attention("gathered")
    cache = model.cache(*RECIPES["4 bits"])
    with pytest.raises(ShapeError, match=r"at most 16 tokens now, not 37.*set_attn_implementation\('kvcfg'\)"):
        generate(model, cache, prompts())
    assert cache.get_seq_length() == 0
    assert generate(model, cache, prompts(), prefill_chunk_size=PAGE).shape == (2, 49)


def test_room_for_drafts_that_was_not_planned_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    cache = model.cache(*RECIPES["4 bits"])
    before = cache.pages.nbytes
    with caplog.at_level(logging.INFO, logger="kvcfg"):
        generate(model, cache, prompts(1), prompt_lookup_num_tokens=6)
    assert f"{cache.pages.nbytes - before} bytes more than planned" in caplog.text
    assert "speculative.num_speculative_tokens=32" in caplog.text


def test_planned_drafts_take_no_more_than_the_plan() -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    drafts = ["speculative.speculative_method=standalone", "speculative.num_speculative_tokens=32"]
    cache = model.cache(*RECIPES["4 bits"], *drafts)
    before = cache.pages.nbytes
    generate(model, cache, prompts(1), prompt_lookup_num_tokens=6)
    assert cache.pages.nbytes == before


@pytest.mark.parametrize("family", ["llama", "mistral, window"])
def test_drafts_may_go_beyond_the_longest_sequence(family: str) -> None:
    model = tiny(family)
    model.set_attention("kvcfg")
    exact = ["cache.kv_cache_format=float32", "workload.max_batch_size=1", "workload.max_seq_len=49"]
    expected = generate(model, model.dynamic(), prompts(1))
    assert torch.equal(generate(model, model.cache(*exact), prompts(1), prompt_lookup_num_tokens=20), expected)
