"""Errors by layer and head are those of the format, whatever the layers keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.evaluation.storing import stored_error
from kvcfg.integrations.transformers import TransformersCache
from kvcfg.results.stored_error import StoredError

transformers = pytest.importorskip("transformers")

WINDOW = torch.randint(1, 97, (90,), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)


def llama() -> Any:
    return transformers.LlamaConfig(**SIZES)


def gemma() -> Any:
    return transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=32)


def error_of(folder: Path, config: Any, *overrides: str, window: torch.Tensor = WINDOW) -> StoredError:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    config.save_pretrained(folder)
    sizes = ["devices=cpu", "workload.max_batch_size=1", "workload.max_seq_len=96", "cache.kv_cache_page_size=32"]
    experiment = kvcfg.compose(["model=hf", f"model.path={folder}", *sizes, *overrides])
    return stored_error(model, window, TransformersCache(kvcfg.build(experiment, model)))


def flat(error: StoredError) -> list[float]:
    return [item or 0.0 for side in (error.keys, error.values) for layer in side for item in layer]


@pytest.mark.parametrize("config", [llama, gemma])
def test_a_format_as_wide_as_the_model_has_no_error(tmp_path: Path, config: Any) -> None:
    error = error_of(tmp_path, config(), "cache.kv_cache_format=float32")
    assert flat(error) == [0.0] * 8


@pytest.mark.parametrize("config", [llama, gemma])
@pytest.mark.parametrize(
    ("override", "low", "high"),
    [("cache.kv_cache_format=bfloat16", 1e-3, 3e-3), ("cache.kv_cache_format=int8", 1e-3, 2e-2)],
)
def test_every_head_has_the_error_of_the_format(
    tmp_path: Path, config: Any, override: str, low: float, high: float
) -> None:
    error = error_of(tmp_path, config(), override)
    assert [len(layer) for layer in error.keys + error.values] == [2] * 4
    assert all(low < item < high for item in flat(error))


@pytest.mark.parametrize("num_tokens", [32, 64, 90], ids=["one page", "two pages", "an open one at the end"])
def test_fewer_bits_have_more_error_in_pages_that_close(tmp_path: Path, num_tokens: int) -> None:
    four, two = (
        flat(error_of(tmp_path, llama(), f"quantization={name}", window=WINDOW[:num_tokens]))
        for name in ("bits4", "bits2")
    )
    assert all(0.01 < 2 * less < more < 1 for less, more in zip(four, two, strict=True))


def test_windows_that_keep_open_pages_beside_layers_that_close_theirs_are_judged(tmp_path: Path) -> None:
    first, second = error_of(tmp_path, gemma(), "quantization=bits2").keys
    assert all(0 < (less or 0.0) < (more or 0.0) / 2 for less, more in zip(first, second, strict=True))


def test_latents_are_one_head_without_values(tmp_path: Path) -> None:
    latent = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    heads = {"num_key_value_heads": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    config = transformers.DeepseekV3Config(**SIZES | latent | experts | heads)
    error = error_of(tmp_path, config, "cache.kv_cache_format=int8")
    assert all(len(layer) == 1 and 1e-3 < (layer[0] or 0.0) < 2e-2 for layer in error.keys)
    assert error.values == [[None], [None]]


def test_a_head_without_numbers_has_no_error(tmp_path: Path) -> None:
    from kvcfg.evaluation.storing import _by_head

    given = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
    assert _by_head(given, given * 2, 1) == [1.0, None]
