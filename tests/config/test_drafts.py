"""What a drafter stores: told, or by its method's default."""

from __future__ import annotations

import pytest

from kvcfg.composition import compose
from kvcfg.config.drafts import draft_layers
from kvcfg.config.model import LayerGroup

TOLD = "speculative.draft_layer_groups=[{kind:full,num_layers:4,n_kv_heads:2,head_dim:32}]"


def groups(*overrides: str) -> list[tuple[str, int, int, int]]:
    layers = draft_layers(compose(overrides)).groups
    return [(group.kind, group.num_layers, group.n_kv_heads, group.head_dim) for group in layers]


def test_nobody_stores_nothing() -> None:
    assert groups() == []


@pytest.mark.parametrize(("method", "count"), [("eagle", 1), ("mtp", 1), ("dflash", 5)])
def test_heads_of_a_model_are_layers_like_its_last(method: str, count: int) -> None:
    assert groups("model=llama-3.1-8b", f"speculative={method}") == [("full", count, 8, 128)]


@pytest.mark.parametrize("overrides", [["speculative=standalone"], ["speculative.speculative_method=standalone"]])
def test_small_model_is_llama_1b_until_it_is_told(overrides: list[str]) -> None:
    assert groups(*overrides) == [("full", 16, 8, 64)]


def test_told_layers_are_taken() -> None:
    assert groups("speculative=eagle", TOLD) == [("full", 4, 2, 32)]
    assert draft_layers(compose(["speculative=eagle", TOLD])).why is None


def test_drafter_of_latents_keeps_latents() -> None:
    assert groups("model=deepseek-v3", "devices=h200", "speculative=mtp") == [("mla", 1, 1, 576)]


def test_drafter_of_a_hybrid_is_like_the_layers_that_keep_everything() -> None:
    assert groups("model=gemma-4-31b", "devices=h200", "speculative=eagle") == [("full", 1, 4, 512)]


def test_drafter_of_windows_alone_has_their_heads_and_no_window() -> None:
    (group,) = draft_layers(compose(["model=mistral-7b-v0.1", "devices=h100", "speculative=eagle"])).groups
    assert group == LayerGroup(kind="full", num_layers=1, n_kv_heads=8, head_dim=128)
