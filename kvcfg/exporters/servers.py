"""What the exporters of servers share: the model's name, parallel degrees, page sizes, drafts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvcfg.exporters.sheet import Sheet
from kvcfg.planning.plans import Plan

MODEL = "MODEL"
"""Stands in a command for weights that the engine could not find by the config."""


def model_name(sheet: Sheet) -> str:
    """The folder or Hub name of the weights."""
    model = sheet.experiment.model
    if name := model.path or model.id:
        return name
    sheet.need(f"{MODEL}: a folder with the weights of {model.name} as transformers saves them.")
    return MODEL


def refuse_page_size(sheet: Sheet, *, multiple_of: int = 1, among: Sequence[int] = (), why: str) -> None:
    """Refuse pages that the engine has no kernel for, and offer the nearest it has."""
    size = sheet.plan.resolution.params.page_size
    if among:
        nearest = min(among, key=lambda other: abs(other - size))
        ok = size in among
    else:
        nearest = max(multiple_of, round(size / multiple_of) * multiple_of)
        ok = size % multiple_of == 0
    if not ok:
        sheet.refuse("cache.kv_cache_page_size", why, f"cache.kv_cache_page_size={nearest}")
    sheet.say("cache.kv_cache_page_size")


def is_latent(plan: Plan) -> bool:
    """Whether layers store one latent for all heads (MLA)."""
    return any(group.is_mla for group in plan.resolution.params.params)


def has_states(plan: Plan) -> bool:
    """Whether layers keep a state beside those that keep tokens (hybrid models)."""
    return any(group.kind == "linear" for group in plan.experiment.model.layer_groups)


def say_limits(sheet: Sheet, **settings: str) -> None:
    """Say what the workload does: by its keys (`max_seq_len`, `max_batch_size`), what the engine calls them."""
    for key, setting in settings.items():
        if (value := getattr(sheet.experiment.workload, key)) is not None:
            sheet.say(f"workload.{key}", **{setting: value})


def refuse_drafts(sheet: Sheet, engine: str, known: Iterable[str]) -> None:
    """Refuse the method of speculation, and say which ones the engine has."""
    rule = f"{engine} {sheet.version} has {', '.join(known)}"
    sheet.refuse("speculative.speculative_method", rule, "speculative=eagle")


def drafter_needed(sheet: Sheet, setting: str) -> None:
    """Say that the weights of a drafter have to be named."""
    method = sheet.experiment.speculative.speculative_method
    if method != "mtp":
        sheet.need(f"{setting}: the weights of the {method} drafter, which the config does not name.")
