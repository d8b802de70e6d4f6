"""How long a prompt and a decode step take with a cache, by this machine's clock, and what reads the cache in them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from kvcfg.cache.layout import page_layout
from kvcfg.cache.paged import PagedKVCache
from kvcfg.evaluation.quality import as_fed
from kvcfg.integrations.paged_attention import NAME
from kvcfg.kernels.cpu.loader import load_kernel
from kvcfg.params import KVCacheParams


@torch.no_grad()
def first_token_seconds(model: Any, cache: Any, prompt: Tensor) -> float:
    """Time a prompt until the token that follows it is known.

    Args:
        model: a causal language model of transformers.
        cache: an empty cache of transformers; it holds the prompt afterwards.
        prompt: `[prompt_tokens]` int64.
    """
    prompt = prompt[None].to(model.device)
    _wait_for(model.device)
    begin = time.perf_counter()
    for piece in as_fed(prompt, cache):
        logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits[:, -1].argmax(-1).item()
    return time.perf_counter() - begin


@torch.no_grad()
def decode_step_seconds(model: Any, cache: Any, first_token: int, num_tokens: int, batch_size: int = 1) -> list[float]:
    """Generate greedily on top of what a cache holds, and time each step.

    Args:
        model: a causal language model of transformers.
        cache: a cache of transformers that holds a prompt; it grows by `num_tokens`.
        first_token: token id to begin with.
        num_tokens: steps to time.
        batch_size: sequences in the cache.

    Returns:
        Seconds of each step.
    """
    token = torch.full((batch_size, 1), first_token, device=model.device)
    seconds = []
    for _ in range(num_tokens):
        _wait_for(model.device)
        begin = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        _wait_for(model.device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def tokens_per_second(step_seconds: list[float], batch_size: int = 1) -> float:
    """Tokens generated per second, by the median step."""
    return batch_size / statistics.median(step_seconds)


def attention_of(model: Any, pages: PagedKVCache) -> str:
    """What reads a cache under a model: kernels, gathered (the model's own attention over copies), or both.

    Args:
        model: a causal language model of transformers.
        pages: its cache.
    """
    if model.config._attn_implementation != NAME or load_kernel("pages") is None:
        return "gathered"
    readers = ("kernels" if _is_read_in_place(group) else "gathered" for group in pages.params.params)
    return "+".join(dict.fromkeys(readers))


def _is_read_in_place(group: KVCacheParams) -> bool:
    """Whether kernels read all pages of a layer group."""
    stored = [group, group.open_pages] if group.closes_pages else [group]
    return all(page_layout(item, item.head_dim if item.is_mla else None) is not None for item in stored)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
