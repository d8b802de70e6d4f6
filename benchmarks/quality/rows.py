"""Parts put together: one row a model, page size and candidate, and the rows as a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from parts import Figures, Part, current

from kvcfg.evaluation.quality import Agreement

YARDSTICK = "fp8_unit"
"""What most engines store by default; every KL is given as a multiple of its KL on the same windows."""

FLOOR = "floor"
"""Full precision against itself."""

TWIN = "-outlier"
"""How the name of a model ends that is another one with outliers among its keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate on all windows that it was measured on.

    Attributes:
        model: its name.
        candidate: its name.
        kind: recipe, experimental or peer.
        page_size: tokens of a page; of a peer, tokens that it was given at a time.
        bits: of one number as it is stored for good.
        bits_effective: of one number of a window, newest tokens included.
        kl: mean KL in nats.
        kl_ci: its 95 % bootstrap interval.
        kl_p99: KL that one prediction in a hundred exceeds.
        noise_floor: mean KL of full precision against itself on the same windows; NaN where it was not measured.
        ratio: KL over that of fp8 at scale 1.0 on the same windows and page size; NaN where that was not measured.
        twin_ratio: KL over that on the model without outliers, on the same windows; NaN for others.
        ppl: perplexity.
        ppl_reference: in full precision.
        top1: share of predictions whose most likely token is the same.
        clip_rate: share of numbers that were cut off.
        num_predictions: what the figures are means of.
        window_tokens: length of the windows.
        note: what must be known to read them.
    """

    model: str
    candidate: str
    kind: str
    page_size: int
    bits: float
    bits_effective: float
    kl: float
    kl_ci: tuple[float, float]
    kl_p99: float
    noise_floor: float
    ratio: float
    twin_ratio: float
    ppl: float
    ppl_reference: float
    top1: float
    clip_rate: float
    num_predictions: int
    window_tokens: int
    note: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A candidate without figures.

    Attributes:
        model: its name.
        candidate: its name.
        page_size: as of a row.
        reason: why.
    """

    model: str
    candidate: str
    page_size: int
    reason: str


_Place = tuple[str, str, int]
_Group = dict[tuple[str, int, int], Figures]


def rows_of(parts: Sequence[Part], window_tokens: int) -> tuple[list[Row], list[Failure]]:
    """Rows by model and page size, most bits first, and what failed, on some windows or on all.

    Args:
        parts: what was measured.
        window_tokens: length of the windows that count.
    """
    groups: dict[_Place, _Group] = {}
    failures = []
    kinds = {}
    for part in current(part for part in parts if part.window_tokens == window_tokens):
        place = (part.model, part.candidate, part.page_size)
        kinds[place] = part.kind
        if isinstance(part.outcome, str):
            failures.append(Failure(*place, part.outcome))
        else:
            groups.setdefault(place, {})[part.window] = part.outcome
    rows = [_row(place, kinds[place], groups) for place in groups if kinds[place] != FLOOR]
    rows.sort(key=lambda row: (row.model, row.page_size, -row.bits, row.candidate))
    return rows, list(dict.fromkeys(failures))


def _row(place: _Place, kind: str, groups: dict[_Place, _Group]) -> Row:
    model, candidate, page_size = place
    group = groups[place]
    figures = list(group.values())
    joined = Agreement.join([_agreement(item) for item in figures])
    floor: _Group = next((other for at, other in groups.items() if at[:2] == (model, FLOOR)), {})
    plain = (model.removesuffix(TWIN), candidate, page_size)
    return Row(
        model=model,
        candidate=candidate,
        kind=kind,
        page_size=page_size,
        bits=figures[-1].bits,
        bits_effective=float(np.mean([item.bits_effective for item in figures])),
        kl=joined.kl.mean().item(),
        kl_ci=joined.kl_interval(),
        kl_p99=float(np.quantile(joined.kl.numpy(), 0.99)),
        noise_floor=_mean_kl([floor[window] for window in group if window in floor]),
        ratio=_ratio(group, groups.get((model, YARDSTICK, page_size), {})),
        twin_ratio=_ratio(group, groups.get(plain, {})) if plain[0] != model else math.nan,
        ppl=joined.nll.mean().exp().item(),
        ppl_reference=joined.nll_reference.mean().exp().item(),
        top1=joined.same_top1.mean().item(),
        clip_rate=max(item.clip_rate for item in figures),
        num_predictions=len(joined.kl),
        window_tokens=next(iter(group))[2],
        note=figures[-1].note,
    )


def _agreement(figures: Figures) -> Agreement:
    """The figures of a window; where only a mean was kept it stands for every prediction, so that means are right."""
    kl = torch.from_numpy(figures.kl.astype(np.float64))
    means = (torch.full_like(kl, mean) for mean in (figures.nll, figures.nll_reference, figures.top1))
    return Agreement(kl, *means)


def _ratio(group: _Group, other: _Group) -> float:
    """Mean KL over that of another candidate, on the windows that both were measured on."""
    shared = [window for window in group if window in other]
    beneath = _mean_kl([other[window] for window in shared])
    return _mean_kl([group[window] for window in shared]) / beneath if shared and beneath else math.nan


def _mean_kl(figures: Sequence[Figures]) -> float:
    return float(np.concatenate([item.kl for item in figures]).astype(np.float64).mean()) if figures else math.nan
