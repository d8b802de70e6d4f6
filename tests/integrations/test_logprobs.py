"""Log-probabilities of given tokens: those that were recorded while the tokens were generated, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.errors import ConfigError

transformers = pytest.importorskip("transformers")

from kvcfg.integrations.paged_attention import NAME  # noqa: E402

RECIPES = {
    "float32": ["cache.kv_cache_format=float32"],
    "int8": ["cache.kv_cache_format=int8"],
    "float8_e4m3fn": ["cache.kv_cache_format=float8_e4m3fn"],
    "4 bits, pages close": ["quantization=bits4"],
}
PROMPT, NEW = 41, 30


@pytest.fixture(params=["LlamaConfig", "MistralConfig"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A small random model with large attention scores, saved in `tmp_path`; one has a window."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    special = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
    window = {"sliding_window": 40} if request.param == "MistralConfig" else {}
    config = getattr(transformers, request.param)(**sizes, **heads, **special, **window)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight.normal_(std=0.2)
    config.save_pretrained(tmp_path)
    made.set_attn_implementation(NAME)
    return made


def experiment_of(folder: Path, *overrides: str) -> kvcfg.ExperimentConfig:
    sizes = ["devices=cpu", "workload.max_batch_size=4", "workload.max_seq_len=128", "cache.kv_cache_page_size=16"]
    return kvcfg.compose(["model=hf", f"model.path={folder}", *sizes, *overrides])


def prompt() -> list[int]:
    return torch.randint(1, 97, (PROMPT,), generator=torch.Generator().manual_seed(3)).tolist()


def generated(model: Any, cache: Any, **options: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens drawn by `generate()` at batch 1, and what it says of them."""
    torch.manual_seed(5)
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True}
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    ids = torch.tensor([prompt()])
    output = model.generate(ids, past_key_values=cache, **given, **wanted, **options)
    tokens = output.sequences[0, PROMPT:].tolist()
    rows = [torch.log_softmax(row[0].float(), -1) for row in output.logits]
    return tokens, torch.stack([row[token] for row, token in zip(rows, tokens, strict=True)])


@pytest.mark.parametrize("recipe", RECIPES)
def test_they_are_the_bits_that_generate_recorded(recipe: str, model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *RECIPES[recipe])
    tokens, recorded = generated(model, kvcfg.TransformersCache(kvcfg.build(experiment, model)))
    assert torch.equal(kvcfg.logprobs(experiment, model, prompt(), tokens), recorded)


@pytest.mark.parametrize("recipe", RECIPES)
def test_they_are_the_bits_of_a_prompt_that_went_in_in_chunks(recipe: str, model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *RECIPES[recipe])
    cache = kvcfg.TransformersCache(kvcfg.build(experiment, model))
    tokens, recorded = generated(model, cache, prefill_chunk_size=16)
    found = kvcfg.logprobs(experiment, model, prompt(), tokens, prefill_chunk_size=16)
    assert torch.equal(found, recorded)


@pytest.mark.parametrize("recipe", RECIPES)
def test_they_are_the_bits_that_an_engine_recorded(recipe: str, model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *RECIPES[recipe])
    engine = kvcfg.serve(experiment, model, step_tokens=16, batch_invariant=True)
    others = [engine.submit(prompt()[:number], NEW, temperature=1.0, seed=number) for number in (3, 30, 17)]
    rollout = engine.submit(prompt(), NEW, temperature=1.0, seed=1)
    engine.run()
    for request in (rollout, *others):
        found = kvcfg.logprobs(experiment, model, request.prompt, request.tokens, batch_invariant=16)
        assert torch.equal(found, torch.tensor(request.logprobs))


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_engine_gives_them_over_its_own_pages(recipe: str, model: Any, tmp_path: Path) -> None:
    engine = kvcfg.serve(experiment_of(tmp_path, *RECIPES[recipe]), model, step_tokens=16, batch_invariant=True)
    request = engine.submit(prompt(), NEW, temperature=1.0, seed=1)
    tokens = request.result()
    assert torch.equal(engine.logprobs(prompt(), tokens), torch.tensor(request.logprobs))
    assert engine.manager.metrics().used_pages == 0


@pytest.mark.parametrize(("recipe", "bound"), [("float32", 1e-5), ("int8", 1e-2)])
def test_other_steps_differ_by_rounding_alone(recipe: str, bound: float, model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *RECIPES[recipe])
    request = kvcfg.serve(experiment, model).submit(prompt(), NEW)
    found = kvcfg.logprobs(experiment, model, prompt(), request.result())
    assert (found - torch.tensor(request.logprobs)).abs().max() < bound


def test_a_coarse_cache_changes_them(model: Any, tmp_path: Path) -> None:
    tokens = prompt()[:NEW]
    exact, coarse = (
        kvcfg.logprobs(experiment_of(tmp_path, *RECIPES[name]), model, prompt(), tokens)
        for name in ("float32", "float8_e4m3fn")
    )
    assert (exact - coarse).abs().max() > 1e-4


@pytest.mark.parametrize(("given", "completion", "says"), [([], [1], "prompt"), ([1], [], "completion")])
def test_no_tokens_are_refused(given: list[int], completion: list[int], says: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        kvcfg.logprobs(experiment_of(tmp_path), model, given, completion)
