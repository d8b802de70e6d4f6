"""A model over packed steps: several sequences, each with some tokens, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcfg.cache.manager import KVCacheManager
from kvcfg.cache.pages import SeqId
from kvcfg.errors import ConfigError, Problem
from kvcfg.integrations.paged_attention import NAME
from kvcfg.integrations.serving.packed_batch import PackedBatch
from kvcfg.integrations.serving.packed_cache import PackedCache

ROW_UNIT = 16
"""Rows of a step with a fixed number of them come in this unit: vectors of the CPU then divide them without a rest."""


class PackedRunner:
    """Runs steps.

    Args:
        manager: the pages; sequences are claimed and allocated by the caller.
        model: a causal language model of transformers; its attention becomes `kvcfg`, which does what its own did
            wherever it is used without packed steps.
        places: for every layer of the model its group and its place in it.
        fixed_rows: rows of every step, filled up with rows that nothing reads; then what a token gets does not depend
            on what else is in its step. None = as many as there are tokens.

    Raises:
        ConfigError: if `fixed_rows` is no multiple of `ROW_UNIT`.
        ShapeError: if a layer keeps no keys and values that attention could read.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        model: Any,
        places: Sequence[tuple[int, int] | None],
        *,
        fixed_rows: int | None = None,
    ) -> None:
        if fixed_rows is not None and (fixed_rows < ROW_UNIT or fixed_rows % ROW_UNIT):
            raise ConfigError(Problem("step_tokens", f"must be a multiple of {ROW_UNIT}", fixed_rows))
        self.manager, self.model, self.fixed_rows = manager, model, fixed_rows
        self._cache = PackedCache(manager, places)
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)

    @torch.no_grad()
    def run(
        self, seq_ids: Sequence[SeqId], num_tokens: Sequence[int], ids: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        """Compute and store a step; the caller commits it.

        Args:
            seq_ids: allocated sequences.
            num_tokens: per sequence, tokens of the step.
            ids: token ids, one sequence after the other.
            wanted: numbers of the tokens whose logits are asked for.

        Returns:
            Logits `[len(wanted), vocabulary]`.
        """
        batch = PackedBatch(self.manager.lay_out(seq_ids, num_tokens), alone=self.fixed_rows is not None)
        padding = [0] * ((self.fixed_rows or batch.num_tokens) - batch.num_tokens)
        device = self.model.device
        tokens = torch.tensor([[*ids, *padding]], device=device)
        positions = torch.tensor([[*batch.positions, *padding]], device=device)
        rows = torch.tensor(list(wanted), dtype=torch.int64, device=device)
        self._cache.batch = batch
        try:
            made = self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if self.fixed_rows is not None else rows,
            )
        finally:
            self._cache.batch = None
        logits: Tensor = made.logits[0]
        return logits if self.fixed_rows is None else logits[rows]
