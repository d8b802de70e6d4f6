"""Small random models that are served, and one-by-one generation to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcfg

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral, window": ("MistralConfig", {"sliding_window": 40}),
    "gemma 2, hybrid windows and soft cap": (
        "Gemma2Config",
        {"sliding_window": 40, "query_pre_attn_scalar": 8, "layer_types": WINDOWED},
    ),
    "qwen3, q/k norms": ("Qwen3Config", {}),
    "gpt-oss, sinks and experts": (
        "GptOssConfig",
        {"sliding_window": 40, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": WINDOWED},
    ),
}

Served = tuple[Any, Callable[..., kvcfg.ExperimentConfig]]


@pytest.fixture
def served(tmp_path: Path) -> Callable[..., Served]:
    """Makes a model of a family with large attention scores, and what composes experiments for it."""

    def make(family: str = "llama", **changes: Any) -> Served:
        name, own = FAMILIES[family]
        config = getattr(transformers, name)(**{**SIZES, **own, **changes})
        torch.manual_seed(0)
        options = {"dtype": torch.float32, "experts_implementation": "batched_mm"}
        model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
        with torch.no_grad():
            for layer in model.model.layers:
                for part, parameter in layer.self_attn.named_parameters():
                    if part.endswith("proj.weight"):
                        parameter.normal_(std=0.2)
        config.save_pretrained(tmp_path)
        sizes = ["devices=cpu", "workload.max_batch_size=4", "workload.max_seq_len=192", "cache.kv_cache_page_size=16"]

        def experiment(*overrides: str) -> kvcfg.ExperimentConfig:
            return kvcfg.compose(["model=hf", f"model.path={tmp_path}", *sizes, *overrides])

        return model, experiment

    return make


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of different lengths; the second and the fourth begin alike."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(1, 97, (count,), generator=generator).tolist() for count in (5, 60, 1, 30, 100, 33)]
    made[3] = made[1][:50] + made[3]
    return made


def one_by_one(model: Any, experiment: kvcfg.ExperimentConfig, prompt: list[int], num_tokens: int) -> list[int]:
    """What `generate()` gives for a prompt alone, with a cache of the experiment."""
    cache = kvcfg.TransformersCache(kvcfg.build(experiment, model))
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
    output = model.generate(torch.tensor([prompt]), past_key_values=cache, **options)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture
def alone() -> Callable[..., list[int]]:
    """See `one_by_one`."""
    return one_by_one
