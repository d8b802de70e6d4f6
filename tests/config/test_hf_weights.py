"""Parameters from headers of safetensors files, and estimated from dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcfg.config.hf_layers import fill_defaults, read_layer_groups
from kvcfg.config.hf_weights import INDEX_NAME, SINGLE_NAME, StoredWeights, estimate_parameters, read_stored_weights
from kvcfg.errors import ConfigError

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


def write_tensors(file: Path, **tensors: tuple[str, list[int], int]) -> None:
    """A safetensors file with an empty body: dtype, shape and bytes of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def test_one_file_is_counted_by_its_header(tmp_path: Path) -> None:
    write_tensors(tmp_path / SINGLE_NAME, a=("BF16", [3, 4], 24), b=("F32", [2], 8))
    assert read_stored_weights(tmp_path) == StoredWeights(num_elements=14, num_bytes=32, dtype="bfloat16")


def test_shards_are_added_up(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", a=("F16", [10], 20))
    write_tensors(tmp_path / "b.safetensors", b=("F16", [5], 10), c=("F16", [1], 2))
    names = {"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": names}))
    assert read_stored_weights(tmp_path) == StoredWeights(num_elements=16, num_bytes=32, dtype="float16")


def test_a_missing_shard_leaves_nothing_to_count(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", a=("F16", [10], 20))
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert read_stored_weights(tmp_path) is None


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    assert read_stored_weights(tmp_path) is None


def test_a_pointer_in_place_of_the_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert read_stored_weights(tmp_path) is None


def test_packed_integers_name_no_compute_dtype(tmp_path: Path) -> None:
    write_tensors(tmp_path / SINGLE_NAME, a=("U8", [16], 16))
    assert read_stored_weights(tmp_path) == StoredWeights(num_elements=16, num_bytes=16, dtype=None)


def test_a_file_that_safetensors_wrote_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    save({"a": torch.zeros(7, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / SINGLE_NAME)
    assert read_stored_weights(tmp_path) == StoredWeights(num_elements=23, num_bytes=88, dtype="float32")


@pytest.mark.parametrize(
    "numbers",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "gpt_neox", "num_key_value_heads": 4},
        {"model_type": "gemma2", "tie_word_embeddings": True},
        {"model_type": "qwen3_moe", **EXPERTS},
        {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 96},
        {"model_type": "deepseek_v3", **MLA, "q_lora_rank": 24, "first_k_dense_replace": 1, "n_routed_experts": 8}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},
        {"model_type": "qwen3_next", **EXPERTS, "shared_expert_intermediate_size": 32},
    ],
    ids=lambda numbers: numbers["model_type"],
)
def test_the_estimate_is_near_the_model_that_transformers_builds(numbers: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {**SMALL, **numbers}
    config = transformers.CONFIG_MAPPING[sizes.pop("model_type")](**sizes)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    read = fill_defaults(json.loads(config.to_json_string()))
    estimate = estimate_parameters(read, read_layer_groups(read, compute_bytes=2))
    assert estimate.total == pytest.approx(built.num_parameters(), rel=0.03)


def test_a_token_passes_through_the_experts_that_are_chosen() -> None:
    numbers = {**SMALL, **EXPERTS, "model_type": "qwen3_moe"}
    estimate = estimate_parameters(numbers, read_layer_groups(numbers, compute_bytes=2))
    assert estimate.total - estimate.active == 4 * (8 - 2) * 3 * 64 * 32


def test_a_missing_dimension_is_named() -> None:
    numbers = {**SMALL, "model_type": "llama"}
    del numbers["vocab_size"]
    with pytest.raises(ConfigError, match=r"config\.json does not state vocab_size"):
        estimate_parameters(numbers, read_layer_groups(numbers, compute_bytes=2))
