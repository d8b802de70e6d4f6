"""Log-probabilities of tokens that are given, over the pages that generation would have filled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcfg.cache.pages import SeqId
from kvcfg.integrations.serving.runner import PackedRunner
from kvcfg.integrations.serving.sampling import token_logprobs


def completion_logprobs(
    runner: PackedRunner, seq_id: SeqId, prompt: Sequence[int], completion: Sequence[int], step_tokens: int
) -> Tensor:
    """Store prompt and completion as a sequence of their own, and say how likely each token of the completion was.

    What the prefix cache has of the prompt is found; the completion is computed in any case. Every query reads what
    it would have read while the tokens were generated one by one.

    Args:
        runner: of one replica.
        seq_id: a name that is not in use; it is released in the end.
        prompt: token ids, at least one.
        completion: token ids, at least one.
        step_tokens: the most tokens of a step.

    Returns:
        float32 `[len(completion)]`.

    Raises:
        CapacityError: if a row or pages are missing.
    """
    manager, first = runner.manager, len(prompt) - 1
    ids = [*prompt, *completion[:-1]]
    manager.claim(seq_id, ids, replica=0)
    try:
        if cached := manager.replicas[0].ledger.forecast(seq_id, len(prompt)).cached_tokens:
            manager.alloc(seq_id, cached + 1)
        found = list[Tensor]()
        while (start := manager.length(seq_id)) < len(ids):
            stop = min(start + step_tokens, len(ids), start + (manager.step_limit(seq_id) or step_tokens))
            manager.alloc_batch([seq_id], stop - start)
            begin = max(start, first)
            logits = runner.run([seq_id], [stop - start], ids[start:stop], range(begin - start, stop - start))
            manager.commit(seq_id, stop - start)
            if begin < stop:
                found.append(token_logprobs(logits, completion[begin - first : stop - first]))
        return torch.cat(found)
    finally:
        manager.release(seq_id)
