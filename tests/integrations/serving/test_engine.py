"""Continuous batching: what each request gets is what it would have got alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.errors import BackendUnavailable, CapacityError, ConfigError
from kvcfg.integrations.serving.request import Finish

transformers = pytest.importorskip("transformers")

FAMILIES = [
    "llama",
    "mistral, window",
    "gemma 2, hybrid windows and soft cap",
    "qwen3, q/k norms",
    "gpt-oss, sinks and experts",
]
RECIPES = {
    "float32": ["cache.kv_cache_format=float32"],
    "bfloat16": ["cache.kv_cache_format=bfloat16"],
    "int8": ["cache.kv_cache_format=int8"],
    "float8_e4m3fn": ["cache.kv_cache_format=float8_e4m3fn"],
    "4 bits, pages close": ["quantization=bits4"],
}
NEW = 12
Served = Callable[..., tuple[Any, Callable[..., kvcfg.ExperimentConfig]]]
Prompts = list[list[int]]


def few_pages(model: Any, experiment: kvcfg.ExperimentConfig, num_pages: int) -> kvcfg.ExperimentConfig:
    """The same with memory for so many pages."""
    plan = kvcfg.plan(experiment)
    params = experiment.to_params()
    held = params.memory(num_pages, plan.max_batch_size, plan.max_seq_len).total
    cache = experiment.cache.model_copy(update={"kv_cache_memory_bytes": held})
    return experiment.model_copy(update={"cache": cache})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["float32", "bfloat16"])
def test_tokens_are_those_of_one_by_one_generation(
    family: str, recipe: str, served: Served, prompts: Prompts, alone: Any
) -> None:
    model, compose = served(family)
    experiment = compose(*RECIPES[recipe])
    engine = kvcfg.serve(experiment, model, step_tokens=32)
    requests = [engine.submit(prompt, NEW) for prompt in prompts]
    engine.run()
    assert [request.tokens for request in requests] == [alone(model, experiment, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_batch_invariant_results_are_the_same_bits_whatever_else_runs(
    family: str, recipe: str, served: Served, prompts: Prompts
) -> None:
    model, compose = served(family)
    experiment = compose(*RECIPES[recipe])
    together = kvcfg.serve(experiment, model, step_tokens=32, batch_invariant=True)
    requests = [together.submit(prompt, NEW) for prompt in prompts]
    together.run()
    for prompt, request in zip(prompts, requests, strict=True):
        single = kvcfg.serve(experiment, model, step_tokens=32, batch_invariant=True).submit(prompt, NEW)
        assert (single.result(), single.logprobs) == (request.tokens, request.logprobs)


@pytest.mark.parametrize("family", ["llama", "gemma 2, hybrid windows and soft cap"])
@pytest.mark.parametrize("recipe", ["float32", "int8", "4 bits, pages close"])
@pytest.mark.parametrize("partial", ["cache.reuse_partial_pages=true", "cache.reuse_partial_pages=false"])
def test_preempted_requests_resume_to_the_same_bits(
    family: str, recipe: str, partial: str, served: Served, prompts: Prompts
) -> None:
    model, compose = served(family)
    experiment = compose(*RECIPES[recipe], partial)
    plenty = kvcfg.serve(experiment, model, step_tokens=32, batch_invariant=True)
    expected = [plenty.submit(prompt, 40).result() for prompt in prompts]
    scarce = kvcfg.serve(few_pages(model, experiment, 11), model, step_tokens=32, batch_invariant=True)
    requests = [scarce.submit(prompt, 40) for prompt in prompts]
    while scarce.pending:
        scarce.step()
        scarce.manager.check_integrity()
    assert scarce.metrics().preemptions > 0
    assert [request.tokens for request in requests] == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_prefix_hit_gives_the_same_bits_as_a_miss_where_steps_are_batch_invariant(
    recipe: str, served: Served, prompts: Prompts
) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(*RECIPES[recipe]), model, step_tokens=32, batch_invariant=True)
    miss = engine.submit(prompts[4], NEW)
    miss.result()
    hit = engine.submit(prompts[4], NEW)
    assert (hit.result(), hit.logprobs) == (miss.tokens, miss.logprobs)
    assert (miss.cached_tokens, hit.cached_tokens) == (0, 96)


@pytest.mark.parametrize("recipe", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_prefix_hit_gives_the_same_tokens_as_a_miss(recipe: str, served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(*RECIPES[recipe]), model, step_tokens=48)
    engine.submit(prompts[1], NEW).result()
    hit = engine.submit(prompts[3], NEW)
    miss = kvcfg.serve(compose(*RECIPES[recipe]), model, step_tokens=48).submit(prompts[3], NEW)
    assert hit.result() == miss.result()
    assert hit.cached_tokens == 48


def test_layouts_that_kernels_do_not_read_are_read_all_the_same(served: Served, prompts: Prompts, alone: Any) -> None:
    model, compose = served(head_dim=20)
    experiment = compose("cache.kv_cache_format=float16")
    engine = kvcfg.serve(experiment, model, step_tokens=32)
    requests = [engine.submit(prompt, NEW) for prompt in prompts]
    engine.run()
    assert [request.tokens for request in requests] == [alone(model, experiment, prompt, NEW) for prompt in prompts]


def test_what_is_drawn_does_not_depend_on_the_others(served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model, step_tokens=32)
    drawn = [engine.submit(prompt, NEW, temperature=1.0, seed=7) for prompt in prompts]
    engine.run()
    again = kvcfg.serve(compose(), model, step_tokens=32).submit(prompts[1], NEW, temperature=1.0, seed=7)
    assert again.result() == drawn[1].tokens
    assert drawn[1].tokens != drawn[3].tokens


def test_tokens_stream_while_others_run_along(served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model)
    first, second = engine.submit(prompts[0], 5), engine.submit(prompts[1], 5)
    seen = []
    for token in first:
        seen.append((token, len(second.tokens)))
    assert [token for token, _ in seen] == first.tokens
    assert [others for _, others in seen] == [1, 2, 3, 4, 5]


def test_a_stop_token_ends_a_request_and_is_its_last(served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model)
    tokens = engine.submit(prompts[0], NEW).result()
    stopped = engine.submit(prompts[0], NEW, stop_ids=[tokens[3]])
    assert stopped.result() == tokens[: tokens.index(tokens[3]) + 1]
    assert stopped.finish is Finish.stop


def test_a_cancelled_request_ends_and_frees_its_pages(served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model)
    running, waiting = engine.submit(prompts[4], NEW), [engine.submit(prompts[0], NEW) for _ in range(4)]
    engine.step()
    running.cancel()
    waiting[-1].cancel()
    assert (running.finish, waiting[-1].finish) == (Finish.cancelled, Finish.cancelled)
    assert list(running) == running.tokens and len(running.tokens) == 1
    engine.run()
    assert engine.manager.metrics().used_pages == 0
    assert engine.metrics().cancelled == 2


def test_higher_priority_runs_first_and_takes_the_row_of_a_lower_one(served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose("workload.max_batch_size=1"), model)
    low = engine.submit(prompts[1], NEW)
    engine.step()
    high = engine.submit(prompts[0], NEW, priority=1)
    assert len(high.result()) == NEW
    assert len(low.tokens) == 1 and low.preemptions == 1
    engine.run()
    assert len(low.tokens) == NEW


def test_a_step_takes_no_more_tokens_than_it_may(served: Served, prompts: Prompts, monkeypatch: Any) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model, step_tokens=7)
    rows, run = [], engine.runner.run

    def counted(numbers: list[int], counts: list[int], *rest: Any) -> torch.Tensor:
        rows.append(sum(counts))
        return run(numbers, counts, *rest)

    monkeypatch.setattr(engine.runner, "run", counted)
    for prompt in prompts:
        engine.submit(prompt, NEW)
    engine.run()
    assert max(rows) == 7


def test_decoding_goes_on_beside_a_long_prompt(served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model, step_tokens=16)
    short = engine.submit(prompts[0], NEW)
    engine.step()
    engine.submit(prompts[4], NEW, priority=1)
    engine.step()
    engine.step()
    assert len(short.tokens) == 3


def test_a_failed_step_leaves_every_request_as_it_was(served: Served, prompts: Prompts, monkeypatch: Any) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model)
    expected = engine.submit(prompts[1], NEW).result()
    request = engine.submit(prompts[1], NEW)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.manager.check_integrity()
    assert request.result() == expected


def test_metrics_count_what_happened(served: Served, prompts: Prompts) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model)
    for _ in range(2):
        engine.submit(prompts[4], NEW).result()
    metrics = engine.metrics()
    assert (metrics.finished, metrics.generated_tokens, metrics.steps) == (2, 2 * NEW, 2 * NEW)
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.prefix_hit_rate) == (104, 96, 0.48)
    assert metrics.peak_pages == 7
    assert len(metrics.times_to_first_token) == 2 and metrics.tokens_per_second > 0
    assert "48.0%" in str(metrics)


@pytest.mark.parametrize(
    ("num_tokens", "new", "error", "says"),
    [
        (0, 5, ConfigError, "prompt tokens"),
        (5, 0, ConfigError, "max_new_tokens"),
        (190, 5, CapacityError, "workload.max_seq_len=195"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    num_tokens: int, new: int, error: type[Exception], says: str, served: Served
) -> None:
    model, compose = served()
    with pytest.raises(error, match=says):
        kvcfg.serve(compose(), model).submit([1] * num_tokens, new)


def test_a_request_larger_than_all_pages_is_refused_at_once(served: Served) -> None:
    model, compose = served()
    engine = kvcfg.serve(few_pages(model, compose(), 4), model)
    with pytest.raises(CapacityError, match="max_new_tokens=5"):
        engine.submit([1] * 60, 20)
    assert len(engine.submit([1] * 60, 5).result()) == 5


def test_negative_temperature_is_refused(served: Served) -> None:
    model, compose = served()
    with pytest.raises(ConfigError, match="temperature"):
        kvcfg.serve(compose(), model).submit([1], temperature=-1.0)


def test_rows_that_vectors_do_not_divide_are_refused(served: Served) -> None:
    model, compose = served()
    with pytest.raises(ConfigError, match="multiple of 16"):
        kvcfg.serve(compose(), model, step_tokens=20, batch_invariant=True)


def test_replicas_are_refused_with_the_way_out(served: Served) -> None:
    model, compose = served()
    experiment = compose("devices.count=2", "devices.data_parallel_degree=2")
    with pytest.raises(BackendUnavailable, match="data_parallel_degree=1"):
        kvcfg.serve(experiment, model)


@pytest.mark.model
def test_smollm2_gives_the_tokens_of_one_by_one_generation(alone: Any) -> None:
    sizes = ["workload.max_batch_size=4", "workload.max_seq_len=256", "cache.kv_cache_format=float32"]
    experiment = kvcfg.compose(["model=smollm2-135m", "devices=cpu", *sizes])
    model, tokenizer = kvcfg.load(experiment)
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    engine = kvcfg.serve(experiment, model, step_tokens=16)
    requests = [engine.submit(prompt, 16, stop_ids=()) for prompt in prompts]
    engine.run()
    assert [request.tokens for request in requests] == [alone(model, experiment, prompt, 16) for prompt in prompts]
