"""Moments are those of keys as they are stored and of the queries that read them, computed here by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcfg
from kvcfg.config.model import LayerGroup
from kvcfg.errors import ShapeError
from kvcfg.evaluation.key_moments import LEADING_TOKENS, MomentCollector, less_page_means

transformers = pytest.importorskip("transformers")

TOKENS, PAGE = 40, 16
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
SHARING = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {"num_key_value_heads": 4},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 8},
}


def model_of(family: str, folder: Path) -> tuple[Any, kvcfg.ExperimentConfig]:
    config = transformers.AutoConfig.for_model(family, **SIZES | SETTINGS[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    config.save_pretrained(folder)
    return model, kvcfg.compose(["model=hf", f"model.path={folder}", "devices=cpu"])


def window_of(seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def collected(family: str, folder: Path, *windows: Tensor) -> tuple[Any, MomentCollector]:
    model, experiment = model_of(family, folder)
    collector = MomentCollector(experiment.model.layer_groups, PAGE)
    for window in windows or (window_of(),):
        collector.run(model, window)
    return model, collector


@torch.no_grad()
def stored(model: Any, window: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[n_kv_heads, tokens, head_dim]` of every layer, from a cache that keeps all."""
    cache = transformers.DynamicCache()
    model(window[None], past_key_values=cache, use_cache=True)
    return [(layer.keys[0].double(), layer.values[0].double()) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_key_moments_are_those_of_keys_less_their_page_mean(family: str, tmp_path: Path) -> None:
    model, collector = collected(family, tmp_path)
    assert sorted(collector.layers) == [0, 1, 2, 3]
    for layer, (keys, _) in enumerate(stored(model, window_of())):
        pages = [keys[:, 8:16], keys[:, 16:32], keys[:, 32:]]
        expected = sum(page.transpose(1, 2) @ page - page.shape[1] * outer(page.mean(1)) for page in pages)
        torch.testing.assert_close(collector.layers[layer].keys, expected, rtol=1e-4, atol=1e-6)


def outer(means: Tensor) -> Tensor:
    return means[:, :, None] * means[:, None, :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_queries_count_over_the_group_that_reads_a_head(family: str, tmp_path: Path) -> None:
    model, collector = collected(family, tmp_path)
    # RoPE turns queries, which leaves their energy as it is.
    attention = model.model.layers[0].self_attn
    made: list[Tensor] = []
    projection = getattr(attention, "q_norm", attention.q_proj)
    hook = projection.register_forward_hook(lambda module, given, output: made.append(output))
    model(window_of()[None])
    hook.remove()
    energies = made[0].view(TOKENS, 2, 2 * 8)[LEADING_TOKENS:].double().square().sum((0, 2))
    traces = collector.layers[0].queries.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(traces, energies, rtol=1e-4, atol=0)


def test_largest_magnitudes_are_of_all_tokens(tmp_path: Path) -> None:
    model, collector = collected("llama", tmp_path)
    for layer, (keys, values) in enumerate(stored(model, window_of())):
        moments = collector.layers[layer]
        torch.testing.assert_close(moments.key_amax, keys.abs().amax((1, 2)))
        torch.testing.assert_close(moments.value_amax, values.abs().amax((1, 2)))


def test_windows_add_up(tmp_path: Path) -> None:
    parts = [collected("llama", tmp_path, window_of(seed))[1].layers[2] for seed in (0, 1)]
    both = collected("llama", tmp_path, window_of(0), window_of(1))[1].layers[2]
    torch.testing.assert_close(both.keys, parts[0].keys + parts[1].keys)
    torch.testing.assert_close(both.queries, parts[0].queries + parts[1].queries)
    torch.testing.assert_close(both.key_amax, parts[0].key_amax.maximum(parts[1].key_amax))
    torch.testing.assert_close(both.value_amax, parts[0].value_amax.maximum(parts[1].value_amax))


def test_queries_of_layers_that_share_keys_count_where_these_are_stored() -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gemma4_text", **SIZES | SHARING), dtype=torch.float32
    ).eval()
    stores = {"num_layers": 1, "n_kv_heads": 2, "head_dim": 8}
    groups = [
        LayerGroup(kind="sliding_window", window=12, layers=(0,), **stores),
        LayerGroup(kind="full", layers=(1,), **stores),
        LayerGroup(kind="shared", layers=(2, 3), **stores | {"num_layers": 2}),
    ]
    collector = MomentCollector(groups, PAGE)
    collector.run(model, window_of())
    assert sorted(collector.layers) == [0, 1]
    made: dict[int, Tensor] = {}
    hooks = [
        layer.self_attn.q_norm.register_forward_hook(lambda module, given, output, at=at: made.update({at: output}))
        for at, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(window_of()[None])
    for hook in hooks:
        hook.remove()
    energies = {
        at: output.view(TOKENS, 2, -1)[LEADING_TOKENS:].double().square().sum((0, 2)) for at, output in made.items()
    }
    for layer in (0, 1):
        traces = collector.layers[layer].queries.diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(traces, energies[layer] + energies[layer + 2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("page_size", [1, 4, 8, 16, 64])
def test_pages_are_counted_from_the_start_of_the_window(page_size: int) -> None:
    keys = torch.randn(2, 37, 3, dtype=torch.float64)
    kept = keys[:, 8:]
    pages = [page for page in keys.split(page_size, 1)]
    expected = []
    for first, page in zip(range(0, 37, page_size), pages, strict=True):
        part = page[:, max(0, 8 - first) :]
        expected.append(part - part.mean(1, keepdim=True))
    assert less_page_means(keys, page_size).shape == kept.shape
    torch.testing.assert_close(less_page_means(keys, page_size), torch.cat(expected, 1))


def test_model_with_other_heads_is_refused(tmp_path: Path) -> None:
    model, experiment = model_of("llama", tmp_path)
    group = experiment.model.layer_groups[0].model_copy(update={"n_kv_heads": 4})
    with pytest.raises(ShapeError, match="layer 0 has 2 KV heads of width 8, the config says 4 of 8"):
        MomentCollector([group], PAGE).run(model, window_of())


def test_model_that_does_not_show_its_keys_is_refused(tmp_path: Path) -> None:
    model, experiment = model_of("llama", tmp_path)
    group = experiment.model.layer_groups[0].model_copy(update={"num_layers": 5})
    with pytest.raises(ShapeError, match=r"layer 4 of this llama model .* does not show its keys"):
        MomentCollector([group], PAGE).run(model, window_of())
