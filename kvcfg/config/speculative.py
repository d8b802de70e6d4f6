"""The `speculative` group: draft tokens, which need slots of the cache too."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvcfg.config.base import refuse
from kvcfg.config.config_file import ConfigFile
from kvcfg.config.model import LayerGroup
from kvcfg.errors import Problem
from kvcfg.param_checks import GROWING, SpeculativeMethod

RejectionSampling = Literal["greedy", "residual", "typical-acceptance", "logit-comparison"]

DEFAULT_DRAFT_TOKENS = 2


class SpeculativeConfig(ConfigFile):
    """Who drafts tokens, how many, and when a draft is accepted."""

    speculative_method: SpeculativeMethod | None = None
    """Who drafts: standalone (a small model), eagle or mtp (heads of the model) or dflash (a whole block at
    once). null = nobody."""

    num_speculative_tokens: int | None = Field(None, ge=1)
    """Draft tokens per step; needs a method. null = 2."""

    draft_layer_groups: tuple[LayerGroup, ...] | None = Field(None, min_length=1)
    """The layers of the drafter, in the form of model.layer_groups; full or mla, since they share the pages of
    the model's own. null = the method's own: one layer like the model's last for eagle and mtp, five for dflash,
    those of Llama 3.2 1B for standalone. Their weights are not planned for: devices.reserved_gib keeps room."""

    rejection_sampling_strategy: RejectionSampling | None = None
    """How drafts are accepted: greedy, residual, typical-acceptance or logit-comparison. null = the method's own."""

    synthetic_acceptance_rate: float | None = Field(None, ge=0, le=1)
    """Share of drafts to accept whatever they are, 0 to 1; for benchmarks. null = really check them."""

    use_relaxed_acceptance_for_thinking: bool = False
    """Accept drafts among the likely tokens, not only the likeliest, while the model thinks aloud."""

    relaxed_topk: int = Field(10, ge=1)
    """How many of the likeliest tokens relaxed acceptance looks at."""

    relaxed_delta: float = Field(0.6, ge=0, le=1)
    """How much less likely than the likeliest token relaxed acceptance allows, 0 to 1."""

    @model_validator(mode="after")
    def _drafts_have_a_method(self) -> SpeculativeConfig:
        problems: list[Problem] = []
        if self.num_speculative_tokens is not None and self.speculative_method is None:
            rule = "needs a speculative_method that drafts them"
            fix = "speculative_method=eagle"
            problems.append(Problem("num_speculative_tokens", rule, self.num_speculative_tokens, fix))
        kinds = [group.kind for group in self.draft_layer_groups or ()]
        if kinds and self.speculative_method is None:
            rule = "needs a speculative_method whose layers they are"
            problems.append(Problem("draft_layer_groups", rule, kinds, "speculative_method=standalone"))
        if any(kind not in GROWING for kind in kinds):
            rule = "must all be full or mla: a drafter shares the pages of the model's layers that keep every token"
            problems.append(Problem("draft_layer_groups", rule, kinds, "draft_layer_groups=null"))
        if problems:
            refuse(*problems)
        return self

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens per step with the default filled in; 0 without a method."""
        if self.speculative_method is None:
            return 0
        return self.num_speculative_tokens or DEFAULT_DRAFT_TOKENS

    def is_standalone(self) -> bool:
        """Whether a small model drafts."""
        return self.speculative_method == "standalone"

    def is_eagle(self) -> bool:
        """Whether EAGLE heads draft."""
        return self.speculative_method == "eagle"

    def is_mtp(self) -> bool:
        """Whether multi-token prediction heads draft."""
        return self.speculative_method == "mtp"

    def is_dflash(self) -> bool:
        """Whether a block drafter drafts."""
        return self.speculative_method == "dflash"
