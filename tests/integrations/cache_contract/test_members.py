"""What a cache must answer, one member at a time, and what it must refuse; compared with DynamicCache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvcfg.errors import CapacityError, ShapeError
from kvcfg.integrations.transformers import TransformersCache
from tests.integrations.cache_contract.models import FAMILIES, Tiny, prompts, tiny

GROWING = ["llama", "deepseek-v3, latents"]


@torch.no_grad()
def feed(model: Tiny, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.model(tokens, past_key_values=cache, use_cache=True).logits
    return logits


def pair(family: str, tokens: torch.Tensor) -> tuple[Tiny, TransformersCache, Any]:
    """Our cache and transformers', after the same tokens."""
    model = tiny(family)
    model.set_attention("kvcfg")
    ours, theirs = model.cache(), model.dynamic()
    for cache in (ours, theirs):
        feed(model, cache, tokens)
    return model, ours, theirs


def go_on_alike(model: Tiny, ours: Any, theirs: Any, batch_size: int) -> None:
    """The next tokens have the same logits with both."""
    tokens = prompts(batch_size, 9)
    torch.testing.assert_close(feed(model, ours, tokens), feed(model, theirs, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 37])
def test_lengths_and_mask_sizes_are_those_of_dynamic_cache(family: str, num_tokens: int) -> None:
    _, ours, theirs = pair(family, prompts(2, num_tokens))
    assert len(ours) == len(theirs)
    assert ours.is_sliding == theirs.is_sliding
    for layer in range(len(ours)):
        assert ours.get_seq_length(layer) == theirs.get_seq_length(layer) == num_tokens
        assert ours.get_query_offset(layer) == num_tokens
        for new in (1, 5):
            assert ours.get_mask_sizes(new, layer) == theirs.get_mask_sizes(new, layer)


def test_update_gives_states_of_the_announced_length() -> None:
    cache = tiny("llama").cache()
    for start in (0, 7, 8):
        keys, values = torch.randn(2, 2, 2, 7 if start == 0 else 1, 32)
        announced, _ = cache.get_mask_sizes(keys.shape[2], 0)
        given = [cache.update(keys, values, layer) for layer in range(2)]
        assert [side.shape for side in given[0]] == [(2, 2, announced, 32)] * 2
        assert torch.equal(given[0][0][:, :, start:] + 0, keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_cache_answers(family: str) -> None:
    cache = tiny(family).cache()
    assert (cache.get_seq_length(), cache.get_max_length(), cache.is_compileable) == (0, 80, False)
    assert cache.is_croppable
    cache.crop(0)
    cache.crop(-3)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0


def test_early_initialization_with_states_of_no_tokens_changes_nothing() -> None:
    model, ours, theirs = tiny("llama"), tiny("llama").cache(), tiny("llama").dynamic()
    sizes = {"batch_size": 2, "num_heads": 2, "head_dim": 32, "dtype": torch.float32, "device": torch.device("cpu")}
    ours.early_initialization(**sizes)
    nothing = torch.zeros(2, 2, 0, 32)
    ours.layers[0].lazy_initialization(nothing, nothing)
    assert ours.get_seq_length() == 0
    go_on_alike(model, ours, theirs, 2)


@pytest.mark.parametrize("family", GROWING)
@pytest.mark.parametrize("drop", [1, 4, 6, 20, 21, 36])
def test_cropped_tokens_are_replaced_by_what_follows(family: str, drop: int) -> None:
    model, ours, theirs = pair(family, prompts(2, 37))
    for cache in (ours, theirs):
        cache.crop(-drop)
    assert ours.get_seq_length() == theirs.get_seq_length() == 37 - drop
    assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)
    go_on_alike(model, ours, theirs, 2)


def test_windows_that_are_not_full_yet_can_be_cropped() -> None:
    model, ours, theirs = pair("mistral, window", prompts(2, 8))
    for cache in (ours, theirs):
        cache.crop(-5)
    go_on_alike(model, ours, theirs, 2)


@pytest.mark.parametrize("family", ["mistral, window", "gemma 3", "gpt-oss, sinks"])
@pytest.mark.parametrize("drop", [0, 1, 12, 30])
def test_windows_that_expect_drafts_can_be_cropped(family: str, drop: int) -> None:
    model = tiny(family)
    model.set_attention("kvcfg")
    ours, theirs = model.cache(), model.dynamic()
    for cache in (ours, theirs):
        cache.activate_past_recording()
        feed(model, cache, prompts(1, 37))
        cache.crop(-drop)
    assert ours.get_seq_length() == 37 - drop
    go_on_alike(model, ours, theirs, 1)


def test_windows_that_have_moved_on_refuse_with_the_way_out() -> None:
    _, ours, _ = pair("mistral, window", prompts(2, 37))
    with pytest.raises(ValueError, match=r"window has moved on.*speculative\.num_speculative_tokens=30"):
        ours.crop(-30)
    assert ours.get_seq_length() == 37


def test_what_was_given_up_before_drafts_were_expected_does_not_come_back() -> None:
    _, ours, _ = pair("mistral, window", prompts(1, 37))
    ours.activate_past_recording()
    with pytest.raises(ValueError, match="before drafts were expected can be cut to 37"):
        ours.crop(-5)


def test_closed_pages_are_left_as_a_whole_or_not_at_all() -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    cache = model.cache("quantization=bits4")
    feed(model, cache, prompts(1, 37))
    with pytest.raises(ValueError, match=r"not opened again.*cut to 16.*num_speculative_tokens=17"):
        cache.crop(-17)
    cache.crop(-21)
    assert cache.get_seq_length() == 16


def test_positive_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        tiny("llama").cache().crop(3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [1, 1]])
def test_reordered_beams_go_on_as_those_of_dynamic_cache(family: str, rows: list[int]) -> None:
    model, ours, theirs = pair(family, prompts(2, 37))
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor(rows))
    go_on_alike(model, ours, theirs, 2)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 1]))
    go_on_alike(model, ours, theirs, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_sequences_go_on_as_those_of_dynamic_cache(family: str) -> None:
    model, ours, theirs = pair(family, prompts(2, 37))
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(3)
    go_on_alike(model, ours, theirs, 6)


@pytest.mark.parametrize("indices", [[1], [1, 0, 1], [-1], [True, False]])
@pytest.mark.parametrize("family", ["llama", "gemma 3", "deepseek-v3, latents"])
def test_selected_sequences_go_on_as_those_of_dynamic_cache(family: str, indices: list[Any]) -> None:
    model, ours, theirs = pair(family, prompts(2, 37))
    chosen = torch.tensor(indices)
    for cache in (ours, theirs):
        cache.batch_select_indices(chosen)
    go_on_alike(model, ours, theirs, int(chosen.sum()) if chosen.dtype == torch.bool else len(chosen))


def test_more_sequences_than_planned_are_refused_with_the_override() -> None:
    _, ours, _ = pair("llama", prompts(2, 37))
    with pytest.raises(CapacityError, match=r"Try: workload\.max_batch_size=8"):
        ours.batch_repeat_interleave(4)
    assert ours.pages.batch_size == 2


def test_beams_that_pages_do_not_suffice_for_change_nothing() -> None:
    model = tiny("llama")
    model.set_attention("kvcfg")
    small = model.cache("cache.kv_cache_format=float32")
    small.pages = type(small.pages)(
        small.pages.params, num_pages=6, max_batch_size=6, max_seq_len=80, layers=small.pages.layers,
        devices=[torch.device("cpu")],
    )  # fmt: skip
    cache = TransformersCache(small.pages)
    feed(model, cache, prompts(1, 37))
    with pytest.raises(CapacityError, match=r"5 pages of their own .* 3 of 6 are free"):
        cache.batch_repeat_interleave(6)
    cache.pages.replica.check_integrity()
    cache.batch_repeat_interleave(4)
    assert cache.pages.batch_size == 4


def test_sequences_longer_than_planned_are_refused_with_the_override() -> None:
    model, ours, _ = pair("llama", prompts(2, 37))
    with pytest.raises(CapacityError, match=r"Try: workload\.max_seq_len=82"):
        feed(model, ours, prompts(2, 45))
    assert ours.get_seq_length() == 37


@pytest.mark.parametrize("recipe", ["cache.kv_cache_format=float32", "quantization=bits4"])
@pytest.mark.parametrize("family", ["llama", "gemma 3"])
def test_a_copy_and_its_original_go_on_independently(family: str, recipe: str) -> None:
    model = tiny(family)
    model.set_attention("kvcfg")
    original = model.cache(recipe)
    feed(model, original, prompts(2, 37))
    expected = feed(model, copy.deepcopy(original), prompts(2, 9))
    other = copy.deepcopy(original)
    feed(model, other, prompts(2, 30))
    other.crop(-3)
    assert original.get_seq_length() == 37
    assert torch.equal(feed(model, original, prompts(2, 9)), expected)
    assert other.get_seq_length() == 64


def test_copies_of_beams_hold_what_the_beams_shared() -> None:
    model, ours, theirs = pair("llama", prompts(2, 37))
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 1]))
    go_on_alike(model, copy.deepcopy(ours), theirs, 2)


def test_reset_makes_room_for_another_batch() -> None:
    model, ours, _ = pair("gemma 3", prompts(2, 37))
    ours.reset()
    assert (ours.get_seq_length(), ours.pages.bytes_in_use) == (0, 0)
    go_on_alike(model, ours, model.dynamic(), 3)


def test_another_batch_size_is_refused() -> None:
    model, ours, _ = pair("llama", prompts(2, 37))
    with pytest.raises(ShapeError, match="begun with 2 sequences and got 3"):
        feed(model, ours, prompts(3, 5))
