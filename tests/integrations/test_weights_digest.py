"""A model is known by its numbers: by every one of them, by what else decides its keys, and by nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvcfg.integrations.weights_digest import model_fingerprint

transformers = pytest.importorskip("transformers")


def model_of(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def test_same_weights_have_the_same_fingerprint() -> None:
    assert model_fingerprint(model_of()) == model_fingerprint(model_of())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", [0, -1])
@torch.no_grad()
def test_last_bit_of_one_weight_shows(dtype: torch.dtype, place: int) -> None:
    model = model_of(dtype)
    before = model_fingerprint(model)
    bits = (
        model.model.layers[1]
        .mlp.up_proj.weight.view(-1)
        .view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    )
    bits[place] ^= 1
    assert model_fingerprint(model) != before


@torch.no_grad()
def test_weights_that_change_places_show() -> None:
    model = model_of()
    before = model_fingerprint(model)
    weights = model.model.layers[0].self_attn.k_proj.weight
    weights.copy_(weights.flip(0))
    assert model_fingerprint(model) != before


def test_saved_and_loaded_model_is_the_same(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model_fingerprint(loaded) == model_fingerprint(model)


def test_other_rope_is_another_model() -> None:
    other = model_of(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert model_fingerprint(other) != model_fingerprint(model_of())


def test_attention_implementation_does_not_matter() -> None:
    model = model_of()
    before = model_fingerprint(model)
    model.set_attn_implementation("eager")
    assert model_fingerprint(model) == before
