"""Attention by the compiled kernel, which reads pages where they lie; the reference where it has no code for them."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from kvcfg.attention import reference
from kvcfg.attention.reach import Reach
from kvcfg.cache.closing_step import ClosingStep
from kvcfg.cache.view import LayerView
from kvcfg.kernels.cpu.attend import QUERY_TYPES, attend_pages

_log = logging.getLogger("kvcfg")


def attend(
    queries: Tensor,
    view: LayerView,
    reach: Reach,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `kvcfg.attention.attend`; queries of other types than float32 and bfloat16 are computed in float32."""
    output = attend_compiled(queries, view, reach, scale=scale, softcap=softcap, sinks=sinks)
    return _by_reference(queries, view, reach, scale, softcap, sinks) if output is None else output


def attend_compiled(
    queries: Tensor,
    view: LayerView,
    reach: Reach,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """The same by the kernel alone; None where it has no code for these pages."""
    closed, opened = view.pages, view.open_pages
    if not closed.ints or (opened is not None and not opened.ints):
        return None
    taken = queries if queries.dtype in QUERY_TYPES else queries.to(torch.float32)
    step = view.step
    ring = step if isinstance(step, ClosingStep) else None
    output = attend_pages(
        taken if taken.stride(-1) == 1 else taken.contiguous(),
        reach.query_starts,
        reach.first,
        reach.stop,
        closed.arena,
        view.tables,
        closed.ints,
        closed.levels,
        closed.head_scales,
        None if opened is None else opened.arena,
        None if opened is None else opened.ints,
        None if ring is None else ring.open_rows,
        None if ring is None else ring.closed,
        0 if ring is None else ring.ring_tokens,
        None if sinks is None else sinks.to(torch.float32).contiguous(),
        scale,
        softcap or 0.0,
    )
    return output if output is None or output.dtype == queries.dtype else output.to(queries.dtype)


def _by_reference(
    queries: Tensor, view: LayerView, reach: Reach, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    _say_once(str(view.storage.params.storage))
    return reference.attend(queries, view, reach, scale=scale, softcap=softcap, sinks=sinks)


@cache
def _say_once(recipe: str) -> None:
    _log.warning("no compiled attention for pages of %s here, so the slower torch path is used", recipe)
