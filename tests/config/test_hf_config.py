"""From a folder or a name on the Hub to the fields of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvcfg.config.hf_config import read_facts
from kvcfg.config.hf_weights import SINGLE_NAME
from kvcfg.config.model import LayerGroup, ModelConfig
from kvcfg.errors import ConfigError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}
ESTIMATE = 1000 * 64 * 2 + 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "some-model", LLAMA)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_weights(folder: Path, dtype: str, shape: list[int], size: int) -> None:
    header = json.dumps({"all": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (folder / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header)


def facts(folder: Path, **stated: Any) -> dict[str, Any]:
    return read_facts(str(folder), None, stated)


def test_a_folder_gives_every_field(folder: Path) -> None:
    assert facts(folder) == {
        "name": "some-model",
        "layer_groups": (LayerGroup(kind="full", num_layers=4, n_kv_heads=2, head_dim=16),),
        "num_q_heads": 4,
        "max_seq_len": 2048,
        "dtype": "float16",
        "n_params": ESTIMATE,
        "n_active_params": None,
        "weight_bits": None,
    }


def test_parameters_are_counted_where_the_weights_are_there(folder: Path) -> None:
    write_weights(folder, "BF16", [123, 10], 2460)
    assert facts(folder)["n_params"] == 1230


def test_bits_of_a_quantized_checkpoint_are_measured(folder: Path) -> None:
    write(folder, {**LLAMA, "quantization_config": {"quant_method": "mxfp4"}})
    write_weights(folder, "U8", [ESTIMATE // 2], ESTIMATE // 2)
    assert (facts(folder)["n_params"], facts(folder)["weight_bits"]) == (ESTIMATE, 4.0)


@pytest.mark.parametrize(
    ("quantization", "bits"), [({"quant_method": "fp8"}, 8.0), ({"quant_method": "gptq", "bits": 4}, 4.0)]
)
def test_bits_of_a_quantized_checkpoint_without_weights_are_those_of_its_method(
    tmp_path: Path, quantization: dict[str, Any], bits: float
) -> None:
    assert facts(write(tmp_path, {**LLAMA, "quantization_config": quantization}))["weight_bits"] == bits


def test_bits_that_cannot_be_known_are_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, {**LLAMA, "quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(ConfigError, match="weight_bits=null: can neither be read nor worked out"):
        facts(folder)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_compute_dtype_are_read(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}
    assert facts(write(tmp_path, {**config, key: "bfloat16"}))["dtype"] == "bfloat16"


def test_an_absent_compute_dtype_is_that_of_the_weights(folder: Path) -> None:
    write(folder, {**LLAMA, "torch_dtype": None})
    write_weights(folder, "F32", [10], 40)
    assert facts(folder)["dtype"] == "float32"


def test_all_that_cannot_be_read_is_asked_for_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        facts(write(tmp_path, {**LLAMA, "torch_dtype": None, "max_position_embeddings": None, "vocab_size": None}))
    assert [problem.key for problem in caught.value.problems] == ["max_seq_len", "dtype", "n_params"]


def test_what_is_stated_is_not_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, {**LLAMA, "torch_dtype": None, "max_position_embeddings": None})
    assert ModelConfig(path=str(folder), dtype="bfloat16", max_seq_len=4096).max_seq_len == 4096


def test_a_stated_value_wins_over_the_file(folder: Path) -> None:
    model = ModelConfig(path=str(folder), layer_groups=None, dtype="float32", n_params=5)
    assert (model.dtype, model.n_params, model.max_seq_len) == ("float32", 5, 2048)


def test_linear_states_follow_the_stated_compute_dtype(tmp_path: Path) -> None:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "head_dim": 16}
    path = str(write(tmp_path, {**LLAMA, **linear, "model_type": "qwen3_next"}))
    half, whole = (ModelConfig(path=path, dtype=dtype).layer_groups[0] for dtype in ("bfloat16", "float32"))
    assert (whole.state_bytes or 0) - (half.state_bytes or 0) == 3 * 2 * 8 * 4 * 2


def test_stated_layer_groups_need_no_file() -> None:
    groups = (LayerGroup(kind="full", num_layers=1, head_dim=8),)
    assert ModelConfig(path="/not/here", package=None, layer_groups=groups).layer_groups == groups


def test_the_default_weights_do_not_follow_a_folder(folder: Path) -> None:
    assert ModelConfig(path=str(folder)).package is None


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_a_multimodal_model_is_read_as_its_language_model(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path, {"model_type": "some_vlm", key: LLAMA, "vision_config": {"hidden_size": 7}})
    assert facts(folder)["num_q_heads"] == 4


def test_a_language_model_two_levels_down_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, {"thinker_config": {"text_config": LLAMA}})
    assert facts(folder)["num_q_heads"] == 4


def test_tied_embeddings_stated_outside_are_counted_once(tmp_path: Path) -> None:
    folder = write(tmp_path, {"text_config": LLAMA, "tie_word_embeddings": True})
    assert facts(folder)["n_params"] == ESTIMATE - 64_000


def test_active_parameters_of_a_mixture_are_read(tmp_path: Path) -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    read = facts(write(tmp_path, {**LLAMA, **experts}))
    assert read["n_params"] - read["n_active_params"] == 4 * 6 * 3 * 64 * 32


@pytest.mark.parametrize("content", [None, "{not json", "[1, 2]"], ids=["absent", "no JSON", "no object"])
def test_a_folder_without_a_readable_config_json_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        facts(tmp_path)
    assert caught.value.problems[0].key == "path"


def test_an_architecture_that_is_not_understood_is_refused_with_the_key_of_the_groups(tmp_path: Path) -> None:
    folder = write(tmp_path, {**LLAMA, "index_topk": 2048})
    with pytest.raises(ValidationError, match="layer_groups=null: cannot be read: index_topk of llama"):
        ModelConfig(path=str(folder))


class TestHub:
    """Names are looked up in a cache made up for the purpose; the network is never asked."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

        def no_network(*_: object, **__: object) -> None:
            raise ConnectionError("no network in tests")

        monkeypatch.setattr(hub, "get_hf_file_metadata", no_network)
        return tmp_path

    def test_a_cached_model_is_read_without_the_network(self, hub: Path) -> None:
        repository = hub / "models--owner--some-model"
        write(repository / "snapshots" / "abc123", LLAMA)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc123")
        model = ModelConfig(id="owner/some-model")
        assert (model.name, model.num_q_heads, model.package) == ("some-model", 4, None)

    def test_a_model_that_is_not_cached_is_refused_offline(self, hub: Path) -> None:
        with pytest.raises(ConfigError, match="is not in the local Hugging Face cache") as caught:
            read_facts(None, "owner/other", {})
        assert caught.value.problems[0].fix == "path=/folder/with/config.json"

    def test_a_name_that_cannot_be_one_is_refused(self, hub: Path) -> None:
        with pytest.raises(ConfigError, match="must be a model on the Hugging Face Hub that you may read"):
            read_facts(None, "no such name!", {})

    def test_a_missing_huggingface_hub_is_named_with_what_installs_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ConfigError, match=r"pip install 'kvcfg\[hf\]'"):
            read_facts(None, "owner/some-model", {})
