"""What a drafter stores beside the model, told or by default.

    eagle, mtp    one layer, with the heads and width of the model's last layers that keep every token
    dflash        five such layers, as published block drafters have
    standalone    the layers of Llama 3.2 1B, in want of a draft model: 16 of 8 heads of 64

Drafts are written at the positions of the tokens they stand for, so a drafter's layers use the pages and
page tables of the model's own layers, and must grow as those do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvcfg.config.model import LayerGroup, ModelConfig

if TYPE_CHECKING:
    from kvcfg.config.experiment import ExperimentConfig

BLOCK_DRAFTER_LAYERS = 5

_LLAMA_3_2_1B = LayerGroup(kind="full", num_layers=16, n_kv_heads=8, head_dim=64)


class DraftLayers(NamedTuple):
    """The layers of a drafter.

    Attributes:
        groups: grouped by what they keep; empty without a drafter, or where nothing says what it keeps.
        why: where a default comes from; None if the layers were told.
    """

    groups: tuple[LayerGroup, ...]
    why: str | None = None


def draft_layers(experiment: ExperimentConfig) -> DraftLayers:
    """What the drafter of an experiment stores."""
    speculative, model = experiment.speculative, experiment.model
    if speculative.speculative_method is None or speculative.draft_layer_groups is not None:
        return DraftLayers(speculative.draft_layer_groups or ())
    if speculative.is_standalone():
        return DraftLayers((_LLAMA_3_2_1B,), "as Llama 3.2 1B: no draft model is told")
    like = _like_the_last(model)
    if like is None:
        return DraftLayers(())
    count = BLOCK_DRAFTER_LAYERS if speculative.is_dflash() else 1
    why = f"{speculative.speculative_method} has {count} like the last of {model.name}"
    return DraftLayers((like.model_copy(update={"num_layers": count}),), why)


def all_layers(experiment: ExperimentConfig) -> tuple[LayerGroup, ...]:
    """The layers of the model, then those of its drafter."""
    return (*experiment.model.layer_groups, *draft_layers(experiment).groups)


def _like_the_last(model: ModelConfig) -> LayerGroup | None:
    """A layer like the model's last that keep every token, else like its last windowed ones without the window."""
    for kinds in (("full", "mla"), ("sliding_window", "chunked")):
        for group in reversed(model.layer_groups):
            if group.kind in kinds:
                kind = "mla" if group.kind == "mla" else "full"
                return group.model_copy(update={"kind": kind, "window": None, "layers": None})
    return None
