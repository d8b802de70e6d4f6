"""How likely given tokens are under the stored cache: what a trainer needs to weigh what a rollout generated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError, Problem
from kvcfg.integrations.serving.engine import serve
from kvcfg.integrations.serving.sampling import token_list, token_logprobs
from kvcfg.integrations.transformers import TransformersCache, build


def logprobs(
    experiment: ExperimentConfig,
    model: Any,
    prompt: Iterable[int] | Tensor,
    completion: Iterable[int] | Tensor,
    *,
    batch_invariant: int | None = None,
    prefill_chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities of a completion's tokens, read through the cache as generation read it.

    By default bit for bit those of `generate()` at batch 1 with a cache of the same experiment, on the same machine
    with as many threads: the prompt goes in as it did there, then one token after the other. With `batch_invariant`
    bit for bit those that an engine recorded, `kvcfg.serve(…, step_tokens=batch_invariant, batch_invariant=True)`,
    whatever else it ran; that takes a forward pass for every `batch_invariant` tokens instead of for every token.

    Args:
        experiment: with the format and recipe of the rollout; the cache is made for this one sequence.
        model: the causal language model of transformers that generated.
        prompt: token ids, a list or a tensor `[num_tokens]` or `[1, num_tokens]`.
        completion: token ids that followed.
        batch_invariant: rows of a step of the engine; None = as `generate()` computes.
        prefill_chunk_size: what `generate()` was given; None = the prompt in one piece.

    Returns:
        float32 `[len(completion)]`, natural logarithms, before temperature.

    Raises:
        ConfigError: if prompt or completion are empty, or as `kvcfg.build` or `kvcfg.serve`.
        ShapeError, CapacityError, BackendUnavailable: as `kvcfg.build` or `kvcfg.serve`.
    """
    given, chosen = token_list(prompt), token_list(completion)
    for key, ids in (("prompt", given), ("completion", chosen)):
        if not ids:
            raise ConfigError(Problem(key, "must have at least one token", ids))
    one = {"max_batch_size": 1, "max_seq_len": len(given) + len(chosen)}
    sized = experiment.model_copy(update={"workload": experiment.workload.model_copy(update=one)})
    if batch_invariant is not None:
        engine = serve(sized, model, step_tokens=batch_invariant, batch_invariant=True)
        return engine.logprobs(given, chosen)
    return _as_generated(TransformersCache(build(sized, model)), model, given, chosen, prefill_chunk_size)


@torch.no_grad()
def _as_generated(cache: Any, model: Any, prompt: list[int], completion: list[int], chunk: int | None) -> Tensor:
    """The forward passes of `generate()` at batch 1, with the tokens that are given in place of those it chose."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    steps = [*torch.split(ids[:, : len(prompt)], chunk or len(prompt), dim=1)]
    steps += torch.split(ids[:, len(prompt) : -1], 1, dim=1) if len(completion) > 1 else ()
    rows, stop = list[Tensor](), 0
    for step in steps:
        start, stop = stop, stop + step.shape[1]
        made = model(
            input_ids=step.contiguous(),
            attention_mask=torch.ones_like(ids[:, :stop]),
            position_ids=torch.arange(start, stop, device=ids.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if stop >= len(prompt):
            rows.append(token_logprobs(made.logits[0], [completion[stop - len(prompt)]]))
    return torch.cat(rows)
