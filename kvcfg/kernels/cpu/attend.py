"""Paged attention in C++ (`pages/attend.h`), as a function and as the operator `torch.ops.kvcfg.attend`.

The operator is for graphs. Called from Python, the function does the same without torch's dispatcher, which takes
longer than short contexts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from kvcfg.errors import BackendUnavailable, ShapeError
from kvcfg.kernels.cpu.page_kernels import KEY_DIM, N_KV_HEADS, TURNED, VALUE_DIM, address, layout_address, page_kernel

QUERY_TYPES = {torch.float32: 0, torch.bfloat16: 2}
"""Types of queries and of outputs, by their number among the element formats."""

# The fields of AttendCall, eight bytes each.
_CALL = Struct("4qP2qP3PPqPP2q2PPqPPPqP2dq")

_SCHEMA = (
    "attend(Tensor queries, Tensor query_starts, Tensor first, Tensor stop, Tensor pages, Tensor tables, "
    "int[] layout, Tensor? levels, Tensor? head_scales, Tensor? open_pages, int[]? open_layout, Tensor? open_rows, "
    "Tensor? closed, int ring_tokens, Tensor? sinks, float scale, float softcap) -> Tensor"
)


def attend_pages(
    queries: Tensor,
    query_starts: Tensor,
    first: Tensor,
    stop: Tensor,
    pages: Tensor,
    tables: Tensor,
    layout: tuple[int, ...],
    levels: Tensor | None = None,
    head_scales: Tensor | None = None,
    open_pages: Tensor | None = None,
    open_layout: tuple[int, ...] | None = None,
    open_rows: Tensor | None = None,
    closed: Tensor | None = None,
    ring_tokens: int = 0,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor | None:
    """Attention over pages where they lie, on as many threads as torch uses; all tensors on the CPU.

    Args:
        queries: `[num_queries, n_q_heads, head_dim]`, a type of `QUERY_TYPES`, the last axis dense.
        query_starts: int32 `[num_sequences + 1]`, first query of each sequence, and the end.
        first: int32 `[num_queries]`, a query sees tokens `[first, stop)` of its sequence.
        stop: int32 `[num_queries]`.
        pages: uint8 `[num_pages + 1, page_bytes]`, dense.
        tables: int32 `[num_sequences, columns]`; page n of a sequence stands in column `n % columns`.
        layout: the page layout as a struct of int64.
        levels: float32 `[2, 16]`, the numbers of 4-bit codes of keys and of values.
        head_scales: float32 `[2, n_kv_heads]`, scales that are not stored; None = 1.
        open_pages: uint8 `[num_pages + 1, page_bytes]`, pages that are being filled; None = there are none.
        open_layout: their layout.
        open_rows: int32 `[num_sequences]`, first open page of each sequence.
        closed: int32 `[num_sequences]`, tokens that are read from `pages`; later ones from open pages.
        ring_tokens: token t is in slot `t % ring_tokens` of its sequence's open pages.
        sinks: float32 `[n_q_heads]`, logits that take part in the sum alone.
        scale: what a product of query and key is multiplied by.
        softcap: bound of the scores; 0 = none.

    Returns:
        `[num_queries, n_q_heads, value_dim]` in the type of `queries`; None where there is no code for this.

    Raises:
        ShapeError: if queries do not fit the layout or the other tensors.
    """
    function = page_kernel("attend")
    # Queries and outputs are turned once for all tokens, so open pages must be turned as closed ones are.
    if function is None or (open_layout is not None and open_layout[TURNED] != layout[TURNED]):
        return None
    num_queries, n_q_heads, head_dim = queries.shape
    if head_dim != layout[KEY_DIM] or n_q_heads % layout[N_KV_HEADS]:
        raise ShapeError(
            f"queries must be [num_queries, a multiple of {layout[N_KV_HEADS]}, {layout[KEY_DIM]}] for these pages, "
            f"got {list(queries.shape)}"
        )
    if len(first) != num_queries or len(stop) != num_queries or len(query_starts) != len(tables) + 1:
        raise ShapeError(
            f"{num_queries} queries of {len(tables)} sequences need as many first and stop, and one start more, got "
            f"{len(first)}, {len(stop)} and {len(query_starts)}"
        )
    output = queries.new_empty((num_queries, n_q_heads, layout[VALUE_DIM]))
    call = _CALL.pack(
        len(tables),
        num_queries,
        n_q_heads,
        QUERY_TYPES[queries.dtype],
        queries.data_ptr(),
        queries.stride(0),
        queries.stride(1),
        output.data_ptr(),
        query_starts.data_ptr(),
        first.data_ptr(),
        stop.data_ptr(),
        pages.data_ptr(),
        pages.shape[1],
        layout_address(layout),
        tables.data_ptr(),
        tables.stride(0),
        tables.shape[1],
        address(levels),
        address(head_scales),
        address(open_pages),
        0 if open_pages is None else open_pages.shape[1],
        0 if open_layout is None else layout_address(open_layout),
        address(open_rows),
        address(closed),
        ring_tokens,
        address(sinks),
        scale,
        softcap,
        torch.get_num_threads(),
    )
    return None if function(call) else output


def _operator(
    queries: Tensor,
    query_starts: Tensor,
    first: Tensor,
    stop: Tensor,
    pages: Tensor,
    tables: Tensor,
    layout: Sequence[int],
    levels: Tensor | None,
    head_scales: Tensor | None,
    open_pages: Tensor | None,
    open_layout: Sequence[int] | None,
    *others: Tensor | float | None,
) -> Tensor:
    opened = None if open_layout is None else tuple(open_layout)
    arguments = (queries, query_starts, first, stop, pages, tables, tuple(layout), levels, head_scales)
    output = attend_pages(*arguments, open_pages, opened, *others)  # type: ignore[arg-type]
    if output is None:
        raise BackendUnavailable(
            "the CPU kernels have no code for these pages here: use backend=reference, or install g++ if a notice "
            "says that kernels are not compiled"
        )
    return output


def _shape_alone(
    queries: Tensor,
    query_starts: Tensor,
    first: Tensor,
    stop: Tensor,
    pages: Tensor,
    tables: Tensor,
    layout: Sequence[int],
    *others: object,
) -> Tensor:
    return queries.new_empty((queries.shape[0], queries.shape[1], layout[VALUE_DIM]))


_library = torch.library.Library("kvcfg", "FRAGMENT")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("attend", _operator, "CPU")
torch.library.register_fake("kvcfg::attend", _shape_alone, lib=_library)
