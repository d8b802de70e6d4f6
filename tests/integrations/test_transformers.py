"""The paged cache built for models of transformers; what `generate()` asks of it is in `cache_contract/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.errors import CapacityError, ShapeError
from kvcfg.integrations.transformers import TransformersCache, layer_places

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3, q/k norms": ("Qwen3Config", {}),
    "gemma 2, hybrid windows and soft cap": ("Gemma2Config", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi-3": ("Phi3Config", {"sliding_window": None}),
    "gpt-oss, sinks and windows": (
        "GptOssConfig",
        {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def model_of(family: str, folder: Any) -> tuple[Any, kvcfg.ExperimentConfig]:
    """A small random model of a family, and the experiment that its saved config.json gives."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **changes})
    torch.manual_seed(0)
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    config.save_pretrained(folder)
    return model, experiment_of(folder)


def experiment_of(folder: Any, *overrides: str) -> kvcfg.ExperimentConfig:
    sizes = ["devices=cpu", "workload.max_batch_size=4", "workload.max_seq_len=64", "cache.kv_cache_page_size=4"]
    return kvcfg.compose(["model=hf", f"model.path={folder}", *sizes, "cache.kv_cache_format=float32", *overrides])


def prompts(batch_size: int = 2, num_tokens: int = 19) -> torch.Tensor:
    return torch.randint(1, 97, (batch_size, num_tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["cache.kv_cache_format=int8", "cache.kv_cache_format=float8_e4m3fn"])
@torch.no_grad()
def test_quantized_results_do_not_depend_on_how_the_prompt_is_fed(family: str, recipe: str, tmp_path: Any) -> None:
    # In float64, so that no rounding of the model itself moves a number across the edge of a quantization step.
    model = model_of(family, tmp_path)[0].double()
    experiment = experiment_of(tmp_path, recipe)
    tokens = prompts(2, 64)
    whole = model(tokens, past_key_values=TransformersCache(kvcfg.build(experiment, model)), use_cache=True).logits
    for size in (1, 17, 64):
        cache = TransformersCache(kvcfg.build(experiment, model))
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split(size, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-6)


def test_quantized_cache_changes_the_logits_a_little(tmp_path: Any) -> None:
    model, _ = model_of("llama", tmp_path)
    with torch.no_grad():
        exact = model(prompts(), use_cache=False).logits
        pages = kvcfg.build(experiment_of(tmp_path, "cache.kv_cache_format=int8"), model)
        stored = model(prompts(), past_key_values=TransformersCache(pages), use_cache=True).logits
    assert 0 < (exact - stored).abs().max() < 0.1 * exact.abs().max()


def test_another_model_than_the_config_is_refused(tmp_path: Any) -> None:
    model, _ = model_of("llama", tmp_path)
    with pytest.raises(ShapeError, match=r"the model has 4 layers of 4 query heads, .* 30 of 9"):
        kvcfg.build(kvcfg.compose(["devices=cpu", "workload.max_batch_size=1"]), model)


def test_plan_that_does_not_fit_is_not_built(tmp_path: Any) -> None:
    model, _ = model_of("llama", tmp_path)
    with pytest.raises(CapacityError, match="cache"):
        kvcfg.build(experiment_of(tmp_path, "cache.kv_cache_memory_bytes=1000"), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_built_cache_takes_the_planned_bytes(family: str, tmp_path: Any) -> None:
    model, experiment = model_of(family, tmp_path)
    assert kvcfg.build(experiment, model).nbytes == kvcfg.plan(experiment).to_dict()["kv_bytes"]


def test_layer_groups_without_layer_numbers_can_be_planned_but_not_run() -> None:
    groups = kvcfg.compose(["model=gemma-2-9b", "devices=h100"]).model.layer_groups
    unnamed = [group.model_copy(update={"layers": None}) for group in groups]
    with pytest.raises(ShapeError, match="layer_groups"):
        layer_places(unnamed)
