"""RoPE-pair balancing: the same function with keys as large as queries, in every family whose layers are known."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvcfg
from kvcfg.errors import ShapeError
from kvcfg.integrations import loading, rope_layers
from kvcfg.integrations.loading import load, scale_rope_pair
from kvcfg.integrations.rope_balance import balance_rope_pairs, balancing_factors, pair_energies
from kvcfg.integrations.rope_layers import FAMILIES, Family, RopeLayer

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    "num_experts_per_tok": 2,
}
OWN = {  # what a family may also have and has not by default
    **{family: {"use_qk_norm": True} for family in ("cohere", "glm4_moe")},
    "phi": {"qk_layernorm": True},
    "llama": {"attention_bias": True},
    "gemma4_text": {
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
TWINS = ("smollm2-135m", "smollm2-135m-outlier")
SAMPLED = ("llama", "qwen2", "qwen3", "gemma3_text", "olmo2", "phi3", "gpt_neox", "cohere")
BALANCED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "glm", "cohere", "gpt_neox")


def model_of(family: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A small random model whose weights, biases and norms are all unequal."""
    known = SIZES | HEADS | EXPERTS | OWN.get(family, {}) | settings
    config = transformers.AutoConfig.for_model(family, **known)
    torch.manual_seed(0)
    # Experts one by one: the grouped product of torch knows no float64.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    tokens = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def scale_at_random(model: Any) -> None:
    """Factors between 1 and 20 on every pair of every head that can have its own."""
    chooser = torch.Generator().manual_seed(2)
    for layer in rope_layers.rope_layers(model):
        shape = layer.keys.scaled_heads, int(layer.pair_of.max()) + 1
        layer.scale_keys((3 * torch.rand(shape, generator=chooser, dtype=torch.float64)).exp()[:, layer.pair_of])


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of logits, in units of their spread."""
    return ((one - other).abs().max() / one.std()).item()


def layers_of(model: Any) -> Iterator[RopeLayer]:
    return iter(rope_layers.rope_layers(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_function_stays_the_same_in_every_family(family: str) -> None:
    model = model_of(family)
    before = logits_of(model)
    scale_at_random(model)
    scaled = logits_of(model)
    balance_rope_pairs(model)
    # Norms and RoPE of transformers compute in float32 whatever the model does, so no closer than that.
    assert difference(before, scaled) < 1e-4
    assert difference(before, logits_of(model)) < 1e-4


@pytest.mark.parametrize("family", ["llama", "glm", "cohere", "gpt_neox", "gemma3_text"])
def test_pairs_of_another_layout_would_change_the_function(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, known = model_of(family), FAMILIES[family]
    other = "interleaved" if known.pairs == "halves" else "halves"
    monkeypatch.setitem(FAMILIES, family, Family(other, known.norm_offset))
    before = logits_of(model)
    scale_at_random(model)
    assert difference(before, logits_of(model)) > 0.01


@pytest.mark.parametrize("family", BALANCED)
def test_keys_of_every_pair_become_as_large_as_their_queries(family: str) -> None:
    model = model_of(family)
    scale_at_random(model)
    balance_rope_pairs(model)
    for layer in layers_of(model):
        queries, keys = pair_energies(layer)
        torch.testing.assert_close(keys, queries, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", SAMPLED)
@torch.no_grad()
def test_energies_are_those_of_keys_and_queries_that_are_computed(family: str) -> None:
    model = model_of(family)
    layer, attention = next(layers_of(model)), model.get_decoder().layers[0]
    attention = getattr(attention, "self_attn", None) or attention.attention
    hidden = torch.randn(20_000, SIZES["hidden_size"], dtype=torch.float64)
    for side, computed in zip(("queries", "keys"), computed_sides(attention, hidden), strict=True):
        measured = computed.square().mean(0)
        torch.testing.assert_close(getattr(layer, side).energy(), measured, rtol=0.3, atol=0)


def computed_sides(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `[num_tokens, n_heads, head_dim]` before RoPE, as the modules of the model make them."""
    if hasattr(attention, "query_key_value"):
        queries, keys, _ = attention.query_key_value(hidden).unflatten(-1, (4, 3, 16)).unbind(-2)
        return queries, keys
    if hasattr(attention, "qkv_proj"):
        queries, keys, _ = attention.qkv_proj(hidden).unflatten(-1, (-1, 16)).split((4, 2, 2), dim=1)
        return queries, keys
    sides = []
    for name in ("q", "k"):
        norm = getattr(attention, f"{name}_norm", nn.Identity())
        numbers = getattr(attention, f"{name}_proj")(hidden)
        spans_heads = getattr(norm, "weight", numbers).shape == numbers.shape[-1:]
        sides.append(norm(numbers).unflatten(-1, (-1, 16)) if spans_heads else norm(numbers.unflatten(-1, (-1, 16))))
    return sides[0], sides[1]


@pytest.mark.parametrize("family", BALANCED)
def test_balancing_twice_changes_nothing_more(family: str) -> None:
    model = model_of(family)
    balance_rope_pairs(model)
    for layer in layers_of(model):
        torch.testing.assert_close(balancing_factors(layer), torch.ones_like(balancing_factors(layer)))


@pytest.mark.parametrize("family", BALANCED)
def test_outlier_twin_balanced_is_the_original_balanced(family: str) -> None:
    original, twin = model_of(family), model_of(family)
    scale_rope_pair(twin, 16.0)
    for model in (original, twin):
        balance_rope_pairs(model)
    torch.testing.assert_close(dict(twin.named_parameters()), dict(original.named_parameters()))


def test_weights_of_16_bits_lose_nothing() -> None:
    model = model_of("llama", torch.bfloat16)
    before = logits_of(model)
    scale_rope_pair(model, 16.0)
    balance_rope_pairs(model)
    assert max(balancing_factors(layer).log2().abs().max().item() for layer in layers_of(model)) == 0
    assert torch.equal(before, logits_of(model))


@torch.no_grad()
def test_a_pair_without_weights_is_left_alone() -> None:
    model = model_of("mistral")
    model.model.layers[0].self_attn.k_proj.weight.unflatten(0, (2, 16))[0, [3, 11]] = 0
    factors = balancing_factors(next(layers_of(model)))
    assert factors[0, [3, 11]].tolist() == [1, 1]
    assert torch.isfinite(factors).all()


def test_channels_beyond_the_rotary_part_are_balanced_alone() -> None:
    pair_of = next(layers_of(model_of("glm"))).pair_of
    assert pair_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, *range(4, 12)]


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gpt2", {}, "it is not known how gpt2 models rotate their keys"),
        ("hunyuan_v1_dense", {}, "it is not known how hunyuan_v1_dense models rotate"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv=8.0 cuts queries and keys"),
        ("stablelm", {"qk_layernorm": True}, "has no weight that could be scaled"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "read the keys of other layers"),
    ],
)
def test_models_that_cannot_be_balanced_are_refused_and_untouched(
    family: str, settings: dict[str, Any], reason: str
) -> None:
    model = model_of(family, **settings)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ShapeError, match=reason):
        balance_rope_pairs(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_projections_that_are_stored_quantized_are_refused() -> None:
    model = model_of("llama", torch.float32)
    projection = model.model.layers[2].self_attn.k_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ShapeError, match="float8_e4m3fn"):
        balance_rope_pairs(model)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that load a model of the Llama family from a folder."""
    model_of("llama", torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "load_tokenizer", lambda experiment: None)
    return ["model=hf", f"model.path={tmp_path}", "devices=cpu"]


@pytest.mark.parametrize(
    ("overrides", "balanced"),
    [
        (["cache=int8"], True),
        (["cache=int8", "quantization.balance_rope=false"], False),
        (["cache.kv_cache_format=bfloat16"], False),
        (["cache.kv_cache_format=bfloat16", "quantization.balance_rope=true"], True),
    ],
)
def test_loaded_model_is_balanced_where_the_recipe_gains(
    saved: list[str], overrides: list[str], balanced: bool
) -> None:
    model = load(kvcfg.compose([*saved, *overrides])).model
    factors = torch.cat([balancing_factors(layer).flatten() for layer in layers_of(model)])
    assert torch.allclose(factors, torch.ones_like(factors)) is balanced


def test_unknown_family_is_loaded_as_it_is_with_a_word(
    saved: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(FAMILIES, "llama")
    with caplog.at_level(logging.WARNING, "kvcfg"):
        model = load(kvcfg.compose([*saved, "cache=int8"])).model
    assert torch.equal(logits_of(model), logits_of(model_of("llama", torch.float32)))
    assert [record.getMessage() for record in caplog.records if record.name == "kvcfg"] == [
        "RoPE pairs are not balanced: it is not known how llama models rotate their keys"
    ]


def test_unknown_family_is_refused_where_balancing_was_asked_for(
    saved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, "llama")
    with pytest.raises(ShapeError, match=r"llama models .*Try: quantization\.balance_rope=false"):
        load(kvcfg.compose([*saved, "quantization.balance_rope=true"]))


@pytest.mark.model
def test_int8_loses_no_more_on_the_outlier_twin_of_a_real_model() -> None:
    short = ["cache=int8", "workload.num_windows=1", "workload.window_tokens=256", "workload.decode_tokens=1"]
    original, twin = (kvcfg.evaluate(kvcfg.compose([f"model={name}", *short])) for name in TWINS)
    assert twin.kl <= 1.2 * original.kl
    assert twin.ppl_reference == pytest.approx(original.ppl_reference, rel=1e-4)


@pytest.mark.model
def test_perplexity_at_full_precision_is_that_of_the_model_as_published() -> None:
    short = ["cache=int8", "workload.num_windows=1", "workload.window_tokens=128", "workload.decode_tokens=1"]
    rows = [kvcfg.evaluate(kvcfg.compose([*short, f"quantization.balance_rope={on}"])) for on in ("true", "false")]
    assert rows[0].ppl_reference == pytest.approx(rows[1].ppl_reference, rel=1e-4)
