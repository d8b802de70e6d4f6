"""Keys and values of a packed step: read by the attention that knows their pages, and by nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.errors import ShapeError

transformers = pytest.importorskip("transformers")


def test_attention_that_is_not_the_engines_is_refused_in_words(served: Any) -> None:
    model, compose = served()
    engine = kvcfg.serve(compose(), model)
    model.set_attn_implementation("sdpa")
    engine.submit([1, 2, 3], 2)
    with pytest.raises(ShapeError, match="only the attention kvcfg"):
        engine.step()


def test_layers_that_keep_latents_are_refused_with_the_way_out() -> None:
    params = kvcfg.compose(["model=deepseek-v2-lite", "devices=cpu"]).to_params()
    manager = kvcfg.KVCacheManager(params, num_pages=1, max_batch_size=1, max_seq_len=16)
    with pytest.raises(ShapeError, match=r"mla layers keep none.*generate"):
        kvcfg.ServingEngine(manager, None, [])


@torch.no_grad()
def test_steps_on_two_threads_are_the_same_bits_whatever_else_runs(served: Any, prompts: list[list[int]]) -> None:
    model, compose = served()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        experiment = compose("cache.kv_cache_format=int8")
        together = kvcfg.serve(experiment, model, step_tokens=32, batch_invariant=True)
        requests = [together.submit(prompt, 8) for prompt in prompts]
        together.run()
        single = kvcfg.serve(experiment, model, step_tokens=32, batch_invariant=True).submit(prompts[4], 8)
        assert (single.result(), single.logprobs) == (requests[4].tokens, requests[4].logprobs)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
