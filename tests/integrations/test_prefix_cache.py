"""One cache for many calls of `generate()`: what a prompt shares with earlier ones is not computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.errors import ShapeError

transformers = pytest.importorskip("transformers")

from kvcfg.integrations.paged_attention import NAME  # noqa: E402

AT_ONCE = ["float32", "bfloat16", "int8", "float8_e4m3fn"]
SHARED, NEW = 100, 20


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A small random Llama, saved in `tmp_path`."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    config.save_pretrained(tmp_path)
    made.set_attn_implementation(NAME)
    return made


def cache_of(model: Any, folder: Path, *overrides: str) -> kvcfg.PrefixCache:
    sizes = ["devices=cpu", "workload.max_batch_size=4", "workload.max_seq_len=192", "cache.kv_cache_page_size=16"]
    return kvcfg.prefix_cache(kvcfg.compose(["model=hf", f"model.path={folder}", *sizes, *overrides]), model)


def prompts(own_tokens: int, seed: int, batch_size: int = 2) -> torch.Tensor:
    shared = torch.randint(1, 97, (batch_size, SHARED), generator=torch.Generator().manual_seed(3))
    own = torch.randint(1, 97, (batch_size, own_tokens), generator=torch.Generator().manual_seed(seed))
    return torch.cat([shared, own], dim=1)


def generate(model: Any, cache: kvcfg.PrefixCache, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int]:
    """Output, and how much was found; the answer is kept."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    with cache.prompt(ids, options.get("attention_mask")) as prompt:
        output = model.generate(ids, past_key_values=cache, **settings)
        prompt.keep(output)
    cache.pages.replica.check_integrity()
    return output, prompt.found


@pytest.mark.parametrize("recipe", AT_ONCE)
def test_a_hit_gives_the_tokens_of_a_miss(recipe: str, model: Any, tmp_path: Path) -> None:
    form = f"cache.kv_cache_format={recipe}"
    cache = cache_of(model, tmp_path, form)
    generate(model, cache, prompts(5, 1))
    hit, found = generate(model, cache, prompts(30, 2))
    miss, nothing = generate(model, cache_of(model, tmp_path, form), prompts(30, 2))
    assert torch.equal(hit, miss)
    assert (found, nothing) == (96, 0)


def test_pages_that_close_are_found_as_they_were_closed(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path, "quantization=bits4")
    with torch.no_grad():
        logits = []
        for _ in range(2):
            with cache.prompt(prompts(5, 1)) as prompt:
                rest = prompts(5, 1)[:, prompt.found :]
                logits.append(model(rest, past_key_values=cache, use_cache=True).logits[:, -5:])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert prompt.found == 96


def test_only_what_is_not_found_is_computed(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    generate(model, cache, prompts(5, 1))
    widths = []

    def noted(_: Any, __: Any, given: dict[str, Any]) -> None:
        widths.append(given["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(noted, with_kwargs=True)
    generate(model, cache, prompts(30, 2))
    hook.remove()
    assert widths == [34] + [1] * (NEW - 1)


def test_the_next_turn_finds_the_answer_too(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    answer, _ = generate(model, cache, prompts(30, 2))
    turn = torch.cat([answer, prompts(3, 4)[:, -3:]], dim=1)
    again, found = generate(model, cache, turn)
    fresh, _ = generate(model, cache_of(model, tmp_path), turn)
    assert found == (SHARED + 30 + NEW - 1) // 16 * 16
    assert torch.equal(again, fresh)


def test_an_answer_that_is_not_kept_is_computed_again(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    with cache.prompt(prompts(30, 2)):
        answer = model.generate(prompts(30, 2), past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    with cache.prompt(answer) as prompt:
        assert prompt.found == (SHARED + 30) // 16 * 16


def test_a_prompt_that_is_known_in_full_still_computes_its_last_page(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    whole = prompts(12, 1)
    first, _ = generate(model, cache, whole)
    again, found = generate(model, cache, whole)
    assert found == SHARED + 12 - 16
    assert torch.equal(first, again)


def test_a_batch_begins_where_its_least_known_prompt_does(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    generate(model, cache, prompts(5, 1))
    other = prompts(30, 2)
    other[1, 50:] = 7
    hit, found = generate(model, cache, other)
    miss, _ = generate(model, cache_of(model, tmp_path), other)
    assert found == 48
    assert torch.equal(hit, miss)


def test_tenants_do_not_find_each_others_prompts(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    generate(model, cache, prompts(5, 1))
    with cache.prompt(prompts(5, 1), salt=b"another") as prompt:
        assert prompt.found == 0


def test_padded_prompts_are_found_by_equally_padded_ones_alone(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    ids, mask = prompts(30, 2), torch.ones(2, SHARED + 30, dtype=torch.long)
    mask[:, :10] = 0
    first, _ = generate(model, cache, ids, attention_mask=mask)
    again, found = generate(model, cache, ids, attention_mask=mask)
    with cache.prompt(ids) as whole:
        assert (found, whole.found) == (128, 0)
    assert torch.equal(first, again)


def test_copies_make_room_for_several_answers(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    ids = prompts(5, 1)
    generate(model, cache, ids)
    settings = {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False}
    with cache.prompt(ids, copies=2) as prompt:
        beams = model.generate(ids, past_key_values=cache, **settings)
        with pytest.raises(ShapeError, match="beams"):
            prompt.keep(beams)
    assert prompt.found == 96
    plain = model.generate(ids, past_key_values=transformers.DynamicCache(config=model.config), **settings)
    assert torch.equal(beams, plain)


def test_prompt_lookup_computes_the_whole_prompt_as_transformers_feeds_it(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path, "cache.kv_cache_format=float32")
    ids = prompts(30, 2, batch_size=1)
    expected, _ = generate(model, cache, ids)
    looked_up, found = generate(model, cache, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, expected)
    assert found == 0
    assert generate(model, cache, ids)[1] == 128


def test_a_second_prompt_inside_the_first_is_refused(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    with cache.prompt(prompts(5, 1)), pytest.raises(ShapeError, match="under way"), cache.prompt(prompts(5, 1)):
        pass


def test_all_pages_are_free_again_after_a_prompt(model: Any, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path)
    generate(model, cache, prompts(5, 1))
    assert cache.pages.batch_size == 0
    assert cache.pages.replica.ledger.metrics().used_pages == 0
