"""What the prefix cache and continuous batching bring: time to the first token, and tokens per second.

    python benchmarks/serving.py [OVERRIDES…]

Two prompts share 2,000 tokens; the second one's first token is timed with the prefix cache and without, through
`generate()` and through the engine. Then requests of different lengths are generated one by one with `generate()`, and
together by the engine. All on the text and with the model of the overrides (SmolLM2-135M and int8 by default), on as
many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import kvcfg
from kvcfg.evaluation.text import text_windows

SHARED, OWN, NEW = 2000, 50, 32
REQUESTS = 16
DEFAULTS = ["model=smollm2-135m", "devices=cpu", "cache.kv_cache_format=int8"]


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def first_tokens(experiment: kvcfg.ExperimentConfig, model: Any, prompts: torch.Tensor) -> None:
    """Print the time to the first token of a prompt whose beginning was there, and was not."""

    def generate(cache: kvcfg.PrefixCache, prompt: torch.Tensor) -> torch.Tensor:
        ids = prompt[None]
        with cache.prompt(ids):
            return model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)

    cache = kvcfg.prefix_cache(experiment, model)
    plain = seconds(lambda: model.generate(prompts[0][None], max_new_tokens=1, do_sample=False))
    cold = seconds(lambda: generate(cache, prompts[0]))
    warm = seconds(lambda: generate(cache, prompts[1]))
    print(f"generate()  {len(prompts[0])} tokens, {SHARED} shared: first token after")
    print(f"            {plain:6.2f} s with DynamicCache, {cold:6.2f} s cold, {warm:6.2f} s warm ({cold / warm:.0f}x)")
    engine = kvcfg.serve(experiment, model)
    for prompt in prompts:
        engine.submit(prompt, 1).result()
    cold, warm = engine.metrics().times_to_first_token
    print(f"engine      {'':21s}    {cold:6.2f} s cold, {warm:6.2f} s warm ({cold / warm:.0f}x)")


def throughput(experiment: kvcfg.ExperimentConfig, model: Any, prompts: list[torch.Tensor]) -> None:
    """Print tokens per second of requests one by one, and together."""
    cache = kvcfg.TransformersCache(kvcfg.build(experiment, model))

    def generate(prompt: torch.Tensor) -> list[int]:
        cache.reset()
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        tokens: list[int] = model.generate(prompt[None], past_key_values=cache, **options)[0, len(prompt) :].tolist()
        return tokens

    begin = time.perf_counter()
    expected = [generate(prompt) for prompt in prompts]
    alone = time.perf_counter() - begin
    engine = kvcfg.serve(experiment, model)
    requests = [engine.submit(prompt, NEW, stop_ids=()) for prompt in prompts]
    together = seconds(engine.run)
    same = sum(request.tokens == tokens for request, tokens in zip(requests, expected, strict=True))
    total = NEW * len(prompts)
    print(f"\n{len(prompts)} requests of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {NEW} new each:")
    print(
        f"            {total / alone:6.1f} tokens/s one by one, {total / together:6.1f} together; same tokens: {same}"
    )
    print(engine.metrics())


def main(overrides: list[str]) -> None:
    """Both."""
    sizes = [f"workload.max_batch_size={REQUESTS}", f"workload.max_seq_len={SHARED + OWN + NEW}"]
    experiment = kvcfg.compose([*DEFAULTS, *sizes, *overrides])
    model, tokenizer = kvcfg.load(experiment)
    workload = experiment.workload.model_copy(update={"window_tokens": SHARED + 2 * OWN, "num_windows": 1})
    text = text_windows(workload, tokenizer)[0]
    prompts = torch.stack([text[: SHARED + OWN], torch.cat([text[:SHARED], text[-OWN:]])])
    first_tokens(experiment, model, prompts)
    throughput(experiment, model, [text[20 * number : 28 * number + 30] for number in range(REQUESTS)])


if __name__ == "__main__":
    main(sys.argv[1:])
