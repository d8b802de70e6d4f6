"""Loading: the outlier twin is the same function with other keys, and what cannot be loaded says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.errors import BackendUnavailable, ShapeError
from kvcfg.integrations.loading import scale_rope_pair, torch_device
from kvcfg.integrations.weights import fetch_weights

transformers = pytest.importorskip("transformers")


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = getattr(transformers, name)(**sizes, **heads)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen2Config", "Qwen3Config"])
@torch.no_grad()
def test_outlier_twin_computes_the_same_with_larger_keys(name: str) -> None:
    model = model_of(name)
    tokens = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    run = {"output_hidden_states": True, "use_cache": True}
    before = model(tokens, **run)
    scale_rope_pair(model, 16.0)
    after = model(tokens, **run)
    for original, twin in zip(before.hidden_states, after.hidden_states, strict=True):
        torch.testing.assert_close(twin, original, rtol=1e-4, atol=1e-5)
    keys, twin_keys = (item.past_key_values.layers[0].keys for item in (before, after))
    torch.testing.assert_close(twin_keys[..., [3, 7]], 16 * keys[..., [3, 7]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(twin_keys[..., [0, 1, 2, 4, 5, 6]], keys[..., [0, 1, 2, 4, 5, 6]], rtol=1e-4, atol=1e-6)


def test_models_whose_rotation_is_not_known_have_no_such_twin() -> None:
    with pytest.raises(ShapeError, match=r"outlier_scale=16: .*gpt2 models rotate.*Try: model\.outlier_scale=1"):
        scale_rope_pair(model_of("GPT2Config"), 16.0)


def test_model_without_weights_says_how_to_name_some() -> None:
    with pytest.raises(kvcfg.ConfigError, match=r"no weights to run.*Try: model=hf model\.path="):
        fetch_weights(kvcfg.compose(["model=tiny"]).model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_offers_the_cpu() -> None:
    with pytest.raises(BackendUnavailable, match="Try: devices=cpu"):
        torch_device(kvcfg.compose(["model=llama-3.1-8b", "devices=h100"]).devices)
