"""Attention is seen as it is computed, in every family whose layers are known, and goes on as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcfg.integrations.attention_recorder import attention_recorded
from kvcfg.integrations.rope_layers import FAMILIES

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    "num_experts_per_tok": 2,
}
OWN = {
    "gemma4_text": {
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    **{
        family: {"layer_types": ["linear_attention", "full_attention"]}
        for family in ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
    },
}
Seen = dict[int, tuple[Tensor, Tensor, Tensor]]


def model_of(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **SIZES | HEADS | EXPERTS | OWN.get(family, {}))
    torch.manual_seed(0)
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


@torch.no_grad()
def run(model: Any) -> tuple[Tensor, Any]:
    """Last hidden numbers, and the cache that the run filled."""
    tokens = torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(1))
    decoder = model.get_decoder()
    cache = transformers.DynamicCache(config=decoder.config)
    return decoder(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state, cache


def recorded(model: Any) -> tuple[Tensor, Any, Seen]:
    seen: Seen = {}
    with attention_recorded(model.get_decoder(), lambda layer, *numbers: seen.update({layer: numbers})):
        return *run(model), seen


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_that_the_cache_is_given_in_every_family(family: str) -> None:
    model = model_of(family)
    before, _ = run(model)
    hidden, cache, seen = recorded(model)
    assert torch.equal(hidden, before)
    assert seen
    for layer, (queries, keys, values) in seen.items():
        assert queries.shape[:3] == (1, 4, 24)
        stored = cache.layers[layer].keys.shape[2]
        assert torch.equal(keys[:, :, -stored:], cache.layers[layer].keys)
        assert torch.equal(values[:, :, -stored:], cache.layers[layer].values)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_queries_are_those_that_attention_is_computed_with(implementation: str) -> None:
    model = model_of("qwen3")
    model.set_attn_implementation(implementation)
    _, _, seen = recorded(model)
    queries, keys, values = seen[0]
    keys, values = (item.repeat_interleave(2, 1) for item in (keys, values))
    read = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    attention = model.model.layers[0].self_attn
    outputs: list[Tensor] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    run(model)
    hook.remove()
    torch.testing.assert_close(read.transpose(1, 2).flatten(2), outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_implementation_is_as_before_even_after_an_error(implementation: str) -> None:
    model = model_of("llama")
    model.set_attn_implementation(implementation)

    def refuse(*_: Any) -> None:
        raise ValueError("seen enough")

    with pytest.raises(ValueError, match="seen enough"), attention_recorded(model.get_decoder(), refuse):
        run(model)
    assert model.config._attn_implementation == implementation
    run(model)
