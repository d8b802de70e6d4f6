"""The attention `kvcfg`: what torch computes over gathered keys and values, read from the pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.kernels.cpu.loader import load_kernel

transformers = pytest.importorskip("transformers")

from kvcfg.integrations import paged_attention  # noqa: E402
from kvcfg.integrations.transformers import TransformersCache  # noqa: E402

pytestmark = pytest.mark.skipif(load_kernel("pages") is None, reason="there is no compiler")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
WINDOWED = ["sliding_attention", "full_attention"] * 2
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "mistral, window": ("MistralConfig", {"sliding_window": 40}),
    "gemma 2, soft cap": (
        "Gemma2Config",
        {"sliding_window": 40, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma 3": ("Gemma3TextConfig", {"sliding_window": 40, "layer_types": WINDOWED, "query_pre_attn_scalar": 8}),
    "gpt-oss, sinks": ("GptOssConfig", {"sliding_window": 40, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
RECIPES = {
    "float32": ["cache.kv_cache_format=float32"],
    "bfloat16": ["cache.kv_cache_format=bfloat16"],
    "int8": ["cache.kv_cache_format=int8"],
    "float8_e4m3fn": ["cache.kv_cache_format=float8_e4m3fn"],
    "4 bits, pages close": ["quantization=bits4"],
}
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-5, "int8": 2e-2, "float8_e4m3fn": 4e-3, "4 bits, pages close": 4e-3}
"""Largest error of a layer's attention: kernels multiply bytes and codes in 8 or 16 bits."""


def model_of(family: str, folder: Any) -> Any:
    """A small random model with large attention scores, which reads pages in place."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **changes})
    torch.manual_seed(0)
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for name, parameter in layer.self_attn.named_parameters():
                if name.endswith("proj.weight"):
                    parameter.normal_(std=0.2)
                elif name == "sinks":
                    parameter.normal_()
    config.save_pretrained(folder)
    model.set_attn_implementation("kvcfg")
    return model


def cache_of(model: Any, folder: Any, *overrides: str) -> TransformersCache:
    sizes = ["devices=cpu", "workload.max_batch_size=4", "workload.max_seq_len=256"]
    return TransformersCache(
        kvcfg.build(kvcfg.compose(["model=hf", f"model.path={folder}", *sizes, *overrides]), model)
    )


def prompts(num_tokens: int, batch_size: int = 3) -> torch.Tensor:
    return torch.randint(1, 97, (batch_size, num_tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def fed(model: Any, cache: Any, tokens: torch.Tensor, size: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of tokens that are fed so many at a time."""
    logits = []
    for start in range(0, tokens.shape[1], size):
        stop = min(start + size, tokens.shape[1])
        seen = {} if mask is None else {"attention_mask": mask[:, :stop]}
        logits.append(model(tokens[:, start:stop], past_key_values=cache, use_cache=True, **seen).logits)
    return torch.cat(logits, dim=1)


@contextmanager
def gathered(model: Any, by: str) -> Iterator[None]:
    """The model's attention is one of transformers' own for a while."""
    model.set_attn_implementation(by)
    yield
    model.set_attn_implementation("kvcfg")


def plain(model: Any) -> str:
    return "sdpa" if model._supports_sdpa else "eager"


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers whose attention read pages in place since the test began."""
    layers: list[int] = []
    attend = paged_attention.attend

    def counted(queries: torch.Tensor, pages: Any, *args: Any, **settings: Any) -> torch.Tensor:
        layers.append(pages.layer)
        return attend(queries, pages, *args, **settings)

    monkeypatch.setattr(paged_attention, "attend", counted)
    return layers


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers whose keys and values were gathered since the test began."""
    layers: list[str] = []
    over_gathered = paged_attention._over_gathered

    def counted(module: Any, *args: Any) -> Any:
        layers.append(type(module).__name__)
        return over_gathered(module, *args)

    monkeypatch.setattr(paged_attention, "_over_gathered", counted)
    return layers


def left_padded(num_tokens: int) -> torch.Tensor:
    mask = torch.ones(3, num_tokens, dtype=torch.long)
    mask[0, :21] = 0
    mask[2, :1] = 0
    return mask


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("size", "num_tokens"), [(1, 70), (16, 150), (150, 150)])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_pages_give_the_logits_of_gathered_ones(
    family: str, size: int, num_tokens: int, page_size: int, tmp_path: Any
) -> None:
    model = model_of(family, tmp_path)
    recipe = (f"cache.kv_cache_page_size={page_size}", *RECIPES["float32"])
    got = fed(model, cache_of(model, tmp_path, *recipe), prompts(num_tokens), size)
    with gathered(model, plain(model)):
        expected = fed(model, cache_of(model, tmp_path, *recipe), prompts(num_tokens), size)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_every_format_is_that_over_gathered_pages(family: str, recipe: str, tmp_path: Any) -> None:
    """Layer for layer on the same pages: what a layer gets wrong by rounding moves codes of the next ones."""
    model = model_of(family, tmp_path)
    largest = 0.0
    attend = paged_attention.attend

    def compared(queries: torch.Tensor, pages: Any, reach: Any, **settings: Any) -> torch.Tensor:
        nonlocal largest
        got = attend(queries, pages, reach, **settings)
        expected = attend(queries, pages, reach, backend="reference", **settings)
        largest = max(largest, ((got - expected).norm() / expected.norm()).item())
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "attend", compared)
        fed(model, cache_of(model, tmp_path, *RECIPES[recipe]), prompts(150), 16)
    assert 0 < largest < ROUNDING[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_of_every_format_are_close_to_those_over_gathered_pages(recipe: str, tmp_path: Any) -> None:
    """Within a few times what the format itself rounds: a number that falls on the other side moves by a whole step."""
    model = model_of("llama", tmp_path)
    got = fed(model, cache_of(model, tmp_path, *RECIPES[recipe]), prompts(150), 16)
    with gathered(model, "sdpa"):
        expected = fed(model, cache_of(model, tmp_path, *RECIPES[recipe]), prompts(150), 16)
    assert (got - expected).norm() < 5e-2 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_is_skipped(family: str, tmp_path: Any) -> None:
    model, mask = model_of(family, tmp_path), left_padded(150)
    got = fed(model, cache_of(model, tmp_path, *RECIPES["float32"]), prompts(150), 50, mask)
    with gathered(model, plain(model)):
        expected = fed(model, cache_of(model, tmp_path, *RECIPES["float32"]), prompts(150), 50, mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_over_a_padded_batch_gives_the_tokens_of_dynamic_cache(family: str, tmp_path: Any) -> None:
    model = model_of(family, tmp_path)
    options = {
        "input_ids": prompts(60),
        "attention_mask": left_padded(60),
        "do_sample": False,
        "max_new_tokens": 30,
        "min_new_tokens": 30,
    }
    got = model.generate(**options, past_key_values=cache_of(model, tmp_path, *RECIPES["float32"]))
    with gathered(model, plain(model)):
        expected = model.generate(**options, past_key_values=transformers.DynamicCache(config=model.config))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_gather_nothing(family: str, tmp_path: Any, in_place: list[int], gathering: list[str]) -> None:
    model = model_of(family, tmp_path)
    fed(model, cache_of(model, tmp_path, *RECIPES["int8"]), prompts(50), 1)
    assert len(in_place) == 4 * 50
    assert not gathering


def test_prompt_continues_from_a_cropped_cache(tmp_path: Any) -> None:
    model, tokens = model_of("llama", tmp_path), prompts(100)
    cache = cache_of(model, tmp_path, *RECIPES["float32"])
    whole = fed(model, cache, tokens, 100)
    cache.crop(-60)
    torch.testing.assert_close(fed(model, cache, tokens[:, 40:], 60), whole[:, 40:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_caches_get_the_attention_of_transformers_bit_for_bit(family: str, tmp_path: Any) -> None:
    model, mask = model_of(family, tmp_path), left_padded(60)
    got = fed(model, transformers.DynamicCache(config=model.config), prompts(60), 25, mask)
    with gathered(model, plain(model)):
        expected = fed(model, transformers.DynamicCache(config=model.config), prompts(60), 25, mask)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache_nothing_changes(family: str, tmp_path: Any) -> None:
    model = model_of(family, tmp_path)
    with torch.no_grad():
        got = model(prompts(60), use_cache=False).logits
        with gathered(model, plain(model)):
            assert torch.equal(got, model(prompts(60), use_cache=False).logits)


def test_static_caches_work_as_they_do(tmp_path: Any) -> None:
    model = model_of("llama", tmp_path)
    got = fed(model, transformers.StaticCache(config=model.config, max_cache_len=80), prompts(60), 25)
    torch.testing.assert_close(got, fed(model, transformers.DynamicCache(), prompts(60), 25), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["quantization=bits4", "cache.kv_cache_format=int8"])
def test_keys_read_late_are_those_that_append_returns(recipe: str, tmp_path: Any) -> None:
    model = model_of("llama", tmp_path)
    late, at_once = (cache_of(model, tmp_path, recipe) for _ in range(2))
    states = torch.randn(2, 3, 2, 200, 32, generator=torch.Generator().manual_seed(0))
    for start in range(0, 200, 8):
        keys, values = states[:, :, :, start : start + 8]
        got = [late.update(keys, values, layer) for layer in range(4)]
        expected = [at_once.pages.append(layer, keys, values) for layer in range(4)]
        for lazy, plain_states in zip(got[1], expected[1], strict=True):
            assert lazy.shape == plain_states.shape
            assert torch.equal(lazy + 0, plain_states)


def test_float64_models_are_computed_in_float64(tmp_path: Any, in_place: list[int]) -> None:
    model = model_of("llama", tmp_path).double()
    got = fed(model, cache_of(model, tmp_path, *RECIPES["float32"]), prompts(60), 20)
    with gathered(model, "sdpa"):
        assert torch.equal(got, fed(model, cache_of(model, tmp_path, *RECIPES["float32"]), prompts(60), 20))
    assert not in_place


def test_bfloat16_models_read_pages_in_place(tmp_path: Any, in_place: list[int]) -> None:
    model = model_of("llama", tmp_path).bfloat16()
    got = fed(model, cache_of(model, tmp_path, *RECIPES["bfloat16"]), prompts(100), 100)
    with gathered(model, "sdpa"):
        expected = fed(model, cache_of(model, tmp_path, *RECIPES["bfloat16"]), prompts(100), 100)
    assert len(in_place) == 4
    assert (got - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("hole", [slice(10, 12), slice(0, 60), slice(57, 60)])
def test_padding_elsewhere_than_at_the_start_gives_what_gathering_gives(
    hole: slice, tmp_path: Any, gathering: list[str]
) -> None:
    model, mask = model_of("llama", tmp_path), torch.ones(3, 60, dtype=torch.long)
    mask[1, hole] = 0
    got = fed(model, cache_of(model, tmp_path, *RECIPES["float32"]), prompts(60), 60, mask)
    assert len(gathering) == (0 if hole == slice(0, 60) else 4)
    with gathered(model, "sdpa"):
        expected = fed(model, cache_of(model, tmp_path, *RECIPES["float32"]), prompts(60), 60, mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_padding_elsewhere_is_named_with_the_way_out(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, mask = model_of("llama", tmp_path), torch.ones(3, 20, dtype=torch.long)
    mask[1, 17:] = 0
    paged_attention._say_once.cache_clear()
    fed(model, cache_of(model, tmp_path, *RECIPES["float32"]), prompts(20), 20, mask)
    assert "padding_side='left'" in caplog.text


def test_masks_of_ones_own_are_taken_as_they_are(tmp_path: Any, gathering: list[str]) -> None:
    model = model_of("llama", tmp_path)
    mask = torch.ones(3, 1, 60, 60, dtype=torch.bool).tril()
    mask[:, :, 30:, 7] = False
    with torch.no_grad():
        cache = cache_of(model, tmp_path, *RECIPES["float32"])
        got = model(prompts(60), attention_mask=mask, past_key_values=cache, use_cache=True).logits
        expected = model(prompts(60), attention_mask=mask, use_cache=False).logits
        causal = model(prompts(60), use_cache=False).logits
    assert gathering
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - causal).abs().max() > 1e-2


def test_attention_weights_are_given_by_attention_that_has_them(tmp_path: Any) -> None:
    model = model_of("gemma 2, soft cap", tmp_path)
    with torch.no_grad():
        cache = cache_of(model, tmp_path, *RECIPES["float32"])
        given = model(prompts(30), past_key_values=cache, use_cache=True, output_attentions=True).attentions
    torch.testing.assert_close(given[0].sum(-1), torch.ones(3, 4, 30), rtol=1e-5, atol=1e-5)


def test_models_on_the_cpu_are_set_to_read_in_place(tmp_path: Any) -> None:
    model = model_of("llama", tmp_path)
    model.set_attn_implementation("sdpa")
    paged_attention.read_pages_in_place(model)
    assert model.config._attn_implementation == "kvcfg"


def test_models_stay_as_they_are_without_a_kernel(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", tmp_path)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(paged_attention, "load_kernel", lambda name: None)
    paged_attention.read_pages_in_place(model)
    assert model.config._attn_implementation == "sdpa"
