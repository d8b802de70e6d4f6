"""The paged cache inside transformers: token for token what DynamicCache gives, on real architectures."""

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


def generate(model: Any, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    inputs = {"input_ids": prompts(), "attention_mask": torch.ones(2, 19, dtype=torch.long), **options}
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=20, min_new_tokens=20)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 10}], ids=["greedy", "sampled"])
def test_generate_gives_the_tokens_of_dynamic_cache(family: str, options: dict[str, Any], tmp_path: Any) -> None:
    model, experiment = model_of(family, tmp_path)
    expected = generate(model, transformers.DynamicCache(config=model.config), **options)
    assert torch.equal(generate(model, TransformersCache(kvcfg.build(experiment, model)), **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batches_give_the_tokens_of_dynamic_cache(family: str, tmp_path: Any) -> None:
    model, experiment = model_of(family, tmp_path)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :8] = 0
    options = {"attention_mask": mask, "do_sample": False}
    expected = generate(model, transformers.DynamicCache(config=model.config), **options)
    assert torch.equal(generate(model, TransformersCache(kvcfg.build(experiment, model)), **options), expected)


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


def test_prompt_continues_from_a_cropped_cache(tmp_path: Any) -> None:
    model, experiment = model_of("llama", tmp_path)
    cache = TransformersCache(kvcfg.build(experiment, model))
    tokens = prompts()
    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
        cache.crop(-7)
        assert cache.get_seq_length() == 12
        again = model(tokens[:, 12:], past_key_values=cache, use_cache=True).logits
        expected = model(tokens, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_reset_makes_room_for_another_batch(tmp_path: Any) -> None:
    model, experiment = model_of("llama", tmp_path)
    cache = TransformersCache(kvcfg.build(experiment, model))
    with torch.no_grad():
        model(prompts(2), past_key_values=cache, use_cache=True)
        cache.reset()
        read = model(prompts(4), past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(read, model(prompts(4), use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_positive_crop_is_refused(tmp_path: Any) -> None:
    model, experiment = model_of("llama", tmp_path)
    with pytest.raises(ValueError, match="negative"):
        TransformersCache(kvcfg.build(experiment, model)).crop(3)


def test_gradients_are_refused_with_the_way_out(tmp_path: Any) -> None:
    model, experiment = model_of("llama", tmp_path)
    with pytest.raises(ShapeError, match=r"torch\.no_grad"):
        model(prompts(), past_key_values=TransformersCache(kvcfg.build(experiment, model)), use_cache=True)


def test_beam_search_is_refused_in_words(tmp_path: Any) -> None:
    model, experiment = model_of("llama", tmp_path)
    with pytest.raises(NotImplementedError, match="num_beams=1"):
        generate(model, TransformersCache(kvcfg.build(experiment, model)), num_beams=2)


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
