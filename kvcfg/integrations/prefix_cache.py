"""The prefix cache for `generate()`: one long-lived cache, and prompts that do not compute what it has of them.

    cache = kvcfg.prefix_cache(experiment, model)
    with cache.prompt(input_ids) as prompt:
        output = model.generate(input_ids, past_key_values=cache)
        prompt.keep(output)                   # the answer's pages too, for the next turn

`generate()` skips the tokens that a cache has already; `prompt` looks them up, and ends the batch when it is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvcfg.cache.building import cache_options
from kvcfg.cache.prefix_pages import PrefixPages
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ShapeError
from kvcfg.integrations.transformers import TransformersCache, planned_pages


def prefix_cache(experiment: ExperimentConfig, model: Any) -> PrefixCache:
    """A cache for many calls of `generate()`, which share the beginnings of their prompts.

    Args:
        experiment: what to build, as for `kvcfg.build`; what no prompt uses stays cached as long as there is room.
        model: the causal language model of transformers that will run.

    Raises:
        ConfigError, BackendUnavailable, CapacityError, ShapeError: as `kvcfg.build`.
    """
    made_of = planned_pages(experiment, model)
    options = cache_options(experiment, calibrated=made_of["calibrated"])
    return PrefixCache(PrefixPages(**made_of, options=options))


class PrefixCache(TransformersCache):
    """`TransformersCache` that finds prompts again; see `prefix_cache`."""

    pages: PrefixPages
    _prompt: Prompt | None = None

    def activate_past_recording(self) -> None:
        """Be ready to take back drafts; see `TransformersCache`.

        Assisted decoding and prompt lookup of transformers feed a whole prompt, whatever the cache has of it, so
        nothing of theirs is found.
        """
        if self._prompt is not None:
            self._prompt.begin_anew()
        super().activate_past_recording()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences; see `TransformersCache`. Rows no longer stand for those of the prompt."""
        super().batch_select_indices(indices)
        if self._prompt is not None:
            self._prompt.moved = True

    @contextmanager
    def prompt(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, copies: int = 1, salt: bytes = b""
    ) -> Iterator[Prompt]:
        """Begin a batch; it ends, and its pages are free again, where the `with` ends.

        Args:
            input_ids: `[batch_size, num_tokens]`, as `generate()` is given them.
            attention_mask: the same, where prompts are padded at their start: only equally padded ones share pages.
            copies: sequences that `generate()` makes of each prompt: `num_return_sequences` or `num_beams`.
            salt: prompts share pages only under equal ones (one per tenant).

        Raises:
            CapacityError: if the cache was not built for so many sequences.
            ShapeError: if a batch is under way, or ids are not of that shape.
        """
        if input_ids.ndim != 2:
            raise ShapeError(f"input_ids must be [batch_size, num_tokens], got {list(input_ids.shape)}")
        padding = [0] * len(input_ids) if attention_mask is None else (attention_mask.cumsum(1) == 0).sum(1).tolist()
        salts = [salt + (b"padded by %d" % tokens if tokens else b"") for tokens in padding for _ in range(copies)]
        rows = input_ids.repeat_interleave(copies, dim=0).tolist()
        prompt = Prompt(self.pages, rows, salts)
        self._prompt = prompt
        try:
            yield prompt
        finally:
            self._prompt = None
            self.reset()


class Prompt:
    """A batch under way; made by `PrefixCache.prompt`.

    Attributes:
        found: tokens of each sequence that were cached.
        moved: whether sequences have changed places since.
    """

    def __init__(self, pages: PrefixPages, rows: list[list[int]], salts: list[bytes]) -> None:
        self._pages, self._rows, self._salts = pages, rows, salts
        self.found = pages.begin(rows, salts)
        self.moved = False

    def begin_anew(self) -> None:
        """Take back what was found, so that all of the prompt is computed, unless a step was made already."""
        if self.found and self._pages.length(0) == self.found:
            self._pages.release()
            self.found = self._pages.begin(self._rows, self._salts, find=False)

    def keep(self, output: Tensor) -> int:
        """Let later prompts find what was generated too: call it last.

        Args:
            output: `[batch_size, num_tokens]`, prompts and answers, what `generate()` returned.

        Returns:
            Tokens that can be found now, over all sequences.

        Raises:
            ShapeError: if beams have changed places, so that rows are not what is stored; or rows are missing.
        """
        if self.moved:
            raise ShapeError("beams have changed places, so these tokens need not be those that are stored")
        return self._pages.keep(output.tolist(), self._salts)
