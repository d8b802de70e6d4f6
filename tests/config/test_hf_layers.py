"""Layer groups from the numbers of a config.json, by hand and against every causal model of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvcfg.config.hf_layers import fill_defaults, read_layer_groups
from kvcfg.config.model import LayerGroup
from kvcfg.errors import ConfigError

LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8}
KINDS = {
    "full": "full_attention",
    "mla": "full_attention",
    "sliding_window": "sliding_attention",
    "chunked": "chunked_attention",
    "linear": "linear_attention",
    "shared": "dummy",
}


def read(**numbers: Any) -> tuple[LayerGroup, ...]:
    return read_layer_groups(fill_defaults({**LLAMA, **numbers}), compute_bytes=2)


def only(**numbers: Any) -> LayerGroup:
    (group,) = read(**numbers)
    return group


def layers_of(groups: tuple[LayerGroup, ...]) -> dict[str, tuple[int, ...] | None]:
    return {group.kind: group.layers for group in groups}


def test_absent_kv_heads_mean_one_for_each_query_head() -> None:
    assert only().n_kv_heads == 8


def test_absent_head_dim_means_hidden_size_over_heads() -> None:
    assert only().head_dim == 8


def test_stated_head_dim_wins_over_hidden_size() -> None:
    assert only(head_dim=32).head_dim == 32


def test_heads_that_do_not_divide_the_hidden_size_need_a_head_dim() -> None:
    with pytest.raises(ConfigError, match="head_dim is not stated and 64 does not divide by 7 heads"):
        read(num_attention_heads=7)


def test_one_group_does_not_list_its_layers() -> None:
    assert only().layers is None


def test_a_window_that_is_switched_off_is_none() -> None:
    group = only(model_type="qwen2", num_key_value_heads=2, sliding_window=4096, use_sliding_window=False)
    assert (group.kind, group.window) == ("full", None)


def test_a_window_that_is_switched_on_starts_at_its_layer() -> None:
    numbers = {"num_key_value_heads": 2, "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}
    assert layers_of(read(model_type="qwen2", **numbers)) == {"full": (0, 1, 2), "sliding_window": (3,)}


def test_a_window_without_a_switch_holds_for_every_layer() -> None:
    group = only(model_type="mistral", num_key_value_heads=2, sliding_window=4096)
    assert (group.kind, group.window, group.num_layers) == ("sliding_window", 4096, 4)


def test_a_null_window_of_mistral_is_none() -> None:
    assert only(model_type="mistral", num_key_value_heads=2, sliding_window=None).kind == "full"


def test_layer_types_are_followed_layer_by_layer() -> None:
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert layers_of(read(layer_types=types, sliding_window=16)) == {"sliding_window": (0, 3), "full": (1, 2)}


def test_layer_types_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer_types names 1 layers of 4"):
        read(layer_types=["full_attention"])


def test_gemma_2_takes_turns_from_a_windowed_layer() -> None:
    assert layers_of(read(model_type="gemma2")) == {"sliding_window": (0, 2), "full": (1, 3)}


def test_gemma_3_has_every_sixth_layer_full_and_fills_in_its_heads() -> None:
    groups = read(model_type="gemma3_text", num_hidden_layers=8, num_attention_heads=None, sliding_window=1024)
    assert layers_of(groups) == {"sliding_window": (0, 1, 2, 3, 4, 6, 7), "full": (5,)}
    assert {(group.n_kv_heads, group.head_dim) for group in groups} == {(4, 256)}


def test_a_pattern_in_the_file_wins_over_that_of_the_architecture() -> None:
    groups = read(model_type="gemma3_text", sliding_window_pattern=2, sliding_window=1024)
    assert layers_of(groups) == {"sliding_window": (0, 2), "full": (1, 3)}


def test_a_pattern_in_letters_counts_its_letters() -> None:
    assert layers_of(read(sliding_window=16, sliding_window_pattern="LLG"))["full"] == (2,)


def test_llama_4_is_chunked_where_it_rotates() -> None:
    groups = read(model_type="llama4_text", num_key_value_heads=2, no_rope_layers=[1, 0, 1, 1])
    assert layers_of(groups) == {"chunked": (0, 2, 3), "full": (1,)}
    assert groups[0].window == 8192


def test_mla_is_rank_and_rope_part_whatever_heads_are_stated() -> None:
    group = only(num_key_value_heads=128, head_dim=64, kv_lora_rank=512, qk_rope_head_dim=64, v_head_dim=128)
    assert (group.kind, group.n_kv_heads, group.head_dim, group.value_dim) == ("mla", 1, 576, 0)


def test_values_of_another_width_than_keys_are_kept() -> None:
    assert only(head_dim=192, v_head_dim=128).value_head_dim == 128


def test_last_layers_that_share_keys_store_nothing() -> None:
    groups = read(model_type="gemma3n_text", num_hidden_layers=10, num_kv_shared_layers=3, sliding_window=512)
    assert layers_of(groups) == {"sliding_window": (0, 1, 2, 3, 5, 6), "full": (4,), "shared": (7, 8, 9)}


def test_global_layers_of_gemma_4_have_heads_of_their_own() -> None:
    wide = {"global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
    groups = read(model_type="gemma4_text", num_hidden_layers=6, num_key_value_heads=8, sliding_window=1024, **wide)
    assert [(group.kind, group.n_kv_heads, group.head_dim) for group in groups] == [
        ("sliding_window", 8, 256),
        ("full", 2, 512),
    ]


def test_state_of_a_gated_delta_net_is_convolution_inputs_and_a_float32_matrix_a_head() -> None:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    widths = {"linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}
    groups = read(model_type="qwen3_next", num_key_value_heads=2, head_dim=8, **heads, **widths)
    linear = next(group for group in groups if group.kind == "linear")
    assert linear.state_bytes == (2 * 2 * 8 + 4 * 16) * 4 * 2 + 4 * 8 * 16 * 4


def test_one_kv_head_serves_all_queries_of_a_multi_query_model() -> None:
    assert only(model_type="falcon", multi_query=True).n_kv_heads == 1


def test_kv_heads_are_found_inside_attn_config() -> None:
    assert only(model_type="dbrx", attn_config={"kv_n_heads": 2}).n_kv_heads == 2


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ({"index_topk": 2048}, "index_topk of llama means a sparse-attention indexer"),
        ({"mamba_d_state": 16}, "mamba_d_state of llama means Mamba states"),
        ({"compress_ratios": [4, 128]}, "compress_ratios of llama means compressed keys"),
        ({"cross_attention_layers": [3]}, "cross_attention_layers of llama means keys of an encoder"),
        ({"layer_types": ["conv"] * 4}, "layers of type conv of llama are not understood"),
        ({"layer_types": ["linear_attention"] * 4}, "the state of linear layers of llama is not understood"),
        ({"model_type": "mixtral"}, "config.json of mixtral does not state num_key_value_heads"),
        ({"num_hidden_layers": None}, "config.json does not state num_hidden_layers"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_what_cannot_be_counted_is_refused_by_name(numbers: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read(**numbers)
    assert caught.value.problems[0].key == "layer_groups"


@pytest.mark.parametrize(
    ("left_out", "at_least"),
    [
        ((), 60),
        (("layer_types",), 60),
        (("layer_types", "sliding_window_pattern"), 60),
        (("num_key_value_heads",), 25),
        (("head_dim",), 50),
        (("sliding_window",), 60),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, tuple) else "",
)
def test_every_causal_model_is_read_as_transformers_reads_it_or_refused(
    left_out: tuple[str, ...], at_least: int
) -> None:
    pytest.importorskip("transformers")
    compared = {name: _compare(name, left_out) for name in _causal_models()}
    assert [name for name, same in compared.items() if same is False] == []
    assert sum(same is True for same in compared.values()) >= at_least


def _causal_models() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _compare(name: str, left_out: tuple[str, ...]) -> bool | None:
    """Whether kvcfg and transformers read a model alike; None where one of them cannot read it."""
    from transformers import CONFIG_MAPPING

    try:
        language_model = CONFIG_MAPPING[name]().get_text_config(decoder=True)
        numbers = json.loads(language_model.to_json_string())
        for key in left_out:
            numbers.pop(key, None)
        theirs = _read_by_transformers(type(language_model).from_dict(json.loads(json.dumps(numbers))))
    except Exception:  # some classes do not accept their own defaults back
        return None
    try:
        groups = read_layer_groups(fill_defaults(numbers), compute_bytes=2)
    except ConfigError:
        return None
    return _alike(groups, theirs)


def _read_by_transformers(config: Any) -> list[tuple[str, int | None, int | None, int | None]]:
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, extras = get_layer_types_and_kwargs(config)
    return [
        (kind, extra.get("sliding_window"), getattr(own, "num_key_value_heads", None), getattr(own, "head_dim", None))
        for kind, extra, own in zip(types, extras, config.per_layer_config, strict=True)
    ]


def _alike(groups: tuple[LayerGroup, ...], theirs: list[tuple[str, int | None, int | None, int | None]]) -> bool:
    by_layer = {index: group for group in groups for index in (group.layers or range(group.num_layers))}
    if len(by_layer) != len(theirs):
        return False
    for index, (kind, window, heads, width) in enumerate(theirs):
        group = by_layer[index]
        has_heads = group.kind in ("full", "sliding_window", "chunked")
        if KINDS[group.kind] != kind or group.window != window:
            return False
        if has_heads and (heads or group.n_kv_heads, width or group.head_dim) != (group.n_kv_heads, group.head_dim):
            return False
    return True
