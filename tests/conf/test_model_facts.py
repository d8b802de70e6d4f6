"""Every model preset against what transformers makes of the published dimensions, and against known cache sizes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from kvcfg import composition
from kvcfg.config.hf_config import read_facts
from kvcfg.config.hf_layers import read_layer_groups
from kvcfg.config.hf_weights import estimate_parameters
from kvcfg.config.model import WINDOWED, LayerGroup, ModelConfig

FOLDER = Path(__file__).parents[2] / "conf" / "model"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED: dict[str, dict[str, object]] = json.loads((Path(__file__).parent / "published_models.json").read_text())

# name, layers, query heads, layers that grow, context, KiB per token and MiB of full windows per sequence in bfloat16
KNOWN_SIZES = """
pythia-160m         12  12 12     2048  36.0   0
smollm2-135m        30   9 30     8192  22.5   0
smollm2-360m        32  15 32     8192  40.0   0
smollm3-3b          36  16 36    65536  72.0   0
tinyllama-1.1b      22  32 22     2048  22.0   0
llama-2-7b          32  32 32     4096 512.0   0
llama-2-13b         40  40 40     4096 800.0   0
llama-3.2-1b        16  32 16   131072  32.0   0
llama-3.2-3b        28  24 28   131072 112.0   0
llama-3.1-8b        32  32 32   131072 128.0   0
llama-3.3-70b       80  64 80   131072 320.0   0
llama-3.1-405b     126 128 126  131072 504.0   0
llama-4-scout       48  40 12 10485760  48.0 1152
mistral-7b-v0.1     32  32  0    32768   0.0 512
mistral-7b-v0.3     32  32 32    32768 128.0   0
mistral-nemo-12b    40  32 40   131072 160.0   0
mistral-small-24b   40  32 40   131072 160.0   0
mixtral-8x7b        32  32 32    32768 128.0   0
qwen2.5-0.5b        24  14 24    32768  12.0   0
qwen2.5-1.5b        28  12 28    32768  28.0   0
qwen2.5-7b          28  28 28    32768  56.0   0
qwen2.5-72b         80  64 80    32768 320.0   0
qwen3-0.6b          28  16 28    40960 112.0   0
qwen3-8b            36  32 36    40960 144.0   0
qwen3-32b           64  64 64    40960 256.0   0
qwen3-30b-a3b       48  32 48    40960  96.0   0
qwen3-235b-a22b     94  64 94    40960 188.0   0
qwen3-next-80b-a3b  48  16 12   262144  24.0   0
qwen3.5-9b          32  16  8   262144  32.0   0
gemma-2-9b          42  16 21     8192 168.0 672
gemma-3-1b          26   4  4    32768   4.0  11
gemma-3-12b         48  16  8   131072  64.0 320
gemma-3-27b         62  32 10   131072  80.0 416
phi-3-mini-4k       32  32  0     4096   0.0 767.6
phi-4               40  40 40    16384 200.0   0
gpt-oss-20b         24  64 12   131072  24.0   3
gpt-oss-120b        36  64 18   131072  36.0   4.5
olmo-3-7b           32  32  8    65536 128.0 1536
glm-4.5-air         46  96 46   131072 184.0   0
minimax-m2          62  48 62   196608 248.0   0
command-r7b         32  32  8   132096  32.0 384
deepseek-v2-lite    27  16 27   163840  30.4   0
deepseek-v3         61 128 61   163840  68.6   0
glm-4.7-flash       47  20 47   202752  52.9   0
kimi-k2.5           61  64 61   262144  68.6   0
gemma-4-26b-a4b     30  16  5   262144  20.0 200
gemma-4-31b         60  32 10   262144  80.0 800
"""
ROWS = [line.split() for line in KNOWN_SIZES.strip().splitlines()]


@cache
def preset(name: str) -> ModelConfig:
    return composition.compose([f"model={name}"]).model


def grows(group: LayerGroup) -> bool:
    return group.kind in ("full", "mla")


def by_first_layer(groups: tuple[LayerGroup, ...]) -> list[LayerGroup]:
    return sorted(groups, key=lambda group: group.layers or ())


def test_known_sizes_cover_every_preset_with_published_dimensions() -> None:
    assert {row[0] for row in ROWS} == set(PUBLISHED) == set(PRESETS) - {"hf", "tiny", "smollm2-135m-outlier"}


@pytest.mark.parametrize(("name", "layers", "heads", "growing", "context", "kib", "mib"), ROWS, ids=lambda cell: cell)
class TestKnownSize:
    def test_layers_and_heads(
        self, name: str, layers: str, heads: str, growing: str, context: str, kib: str, mib: str
    ) -> None:
        model = preset(name)
        layers_that_grow = sum(group.num_layers for group in model.layer_groups if grows(group))
        found = (model.num_layers, model.num_q_heads, layers_that_grow, model.max_seq_len)
        assert found == (int(layers), int(heads), int(growing), int(context))

    def test_bytes_per_token_and_per_window(
        self, name: str, layers: str, heads: str, growing: str, context: str, kib: str, mib: str
    ) -> None:
        groups = preset(name).layer_groups
        per_token = sum(group.elements_per_token * 2 for group in groups if grows(group))
        windows = sum(group.elements_per_token * 2 * (group.window or 0) for group in groups if group.kind in WINDOWED)
        assert (round(per_token / 2**10, 1), round(windows / 2**20, 1)) == (float(kib), float(mib))


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A folder with config.json as transformers writes it for the published dimensions."""
    configs = pytest.importorskip("transformers").CONFIG_MAPPING
    numbers = dict(PUBLISHED[name])
    configs[numbers.pop("model_type")](**numbers, dtype=preset(name).dtype).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(PUBLISHED))
class TestAgainstTransformers:
    def test_preset_has_the_layer_groups_of_config_json(self, name: str, folder: Path) -> None:
        facts = read_facts(str(folder), None, {})
        assert by_first_layer(facts["layer_groups"]) == by_first_layer(preset(name).layer_groups)

    def test_preset_has_the_numbers_of_config_json(self, name: str, folder: Path) -> None:
        facts, model = read_facts(str(folder), None, {}), preset(name)
        read = (facts["num_q_heads"], facts["max_seq_len"], facts["dtype"])
        assert read == (model.num_q_heads, model.max_seq_len, model.dtype)

    def test_parameters_follow_from_the_dimensions(self, name: str, folder: Path) -> None:
        facts, model = read_facts(str(folder), None, {}), preset(name)
        assert facts["n_params"] == pytest.approx(model.n_params, rel=0.04)  # presets may count a vision tower

    def test_active_parameters_are_stated_for_mixtures_alone(self, name: str, folder: Path) -> None:
        active = read_facts(str(folder), None, {})["n_active_params"]
        assert (active is None) == (preset(name).n_active_params is None)


@pytest.mark.parametrize(
    "name", ["mixtral-8x7b", "gpt-oss-120b", "deepseek-v3", "qwen3-next-80b-a3b", "gemma-4-26b-a4b"]
)
def test_active_parameters_follow_from_the_dimensions(name: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    everything = estimate_parameters(config, preset(name).layer_groups).active
    embeddings = 2 * config["vocab_size"] * config["hidden_size"]  # which makers count, count once or leave out
    assert everything * 0.99 - embeddings <= preset(name).n_active_params <= everything * 1.01


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "hf"])
def test_preset_is_called_like_its_file(name: str) -> None:
    assert preset(name).name == name


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"smollm2-135m"}))
def test_preset_does_not_inherit_the_default_weights(name: str) -> None:
    assert preset(name).package is None
    assert preset(name).id


def test_the_default_preset_equals_the_defaults_of_the_model() -> None:
    assert preset("smollm2-135m") == ModelConfig()


def test_the_outlier_twin_differs_in_its_outliers_alone() -> None:
    assert preset("smollm2-135m-outlier") == ModelConfig(name="smollm2-135m-outlier", outlier_scale=16.0)


def test_tiny_has_the_parameters_of_a_model_of_its_size() -> None:
    transformers = pytest.importorskip("transformers")
    tiny = preset("tiny")
    (group,) = tiny.layer_groups
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=group.num_layers,
        num_attention_heads=tiny.num_q_heads,
        num_key_value_heads=group.n_kv_heads,
        head_dim=group.head_dim,
        tie_word_embeddings=True,
    )
    assert transformers.LlamaForCausalLM(config).num_parameters() == tiny.n_params


def test_state_bytes_are_those_that_transformers_keeps() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    numbers = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16)
    config = transformers.Qwen3NextConfig(
        **numbers,
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        dtype="bfloat16",
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layer = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values.layers[0]
    kept = sum(state.nbytes for state in (*layer.conv_states.values(), *layer.recurrent_states.values()))
    linear = next(group for group in read_layer_groups(config.to_dict(), compute_bytes=2) if group.kind == "linear")
    assert linear.state_bytes == kept
