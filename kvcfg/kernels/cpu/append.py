"""Tokens into pages in C++ (`pages/append.h`), as a function and as the operator `torch.ops.kvcfg.append`.

The operator is for graphs. Called from Python, the function does the same without torch's dispatcher, which takes
longer than a token does.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from kvcfg.errors import BackendUnavailable, ShapeError
from kvcfg.kernels.cpu.page_kernels import KEY_DIM, N_KV_HEADS, VALUE_DIM, address, layout_address, page_kernel

NUMBER_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Types of keys and values as they come, by their number among the element formats."""

# The fields of AppendCall, eight bytes each.
_CALL = Struct("qP2qP2qqPPP2qPPPq")

_NO_CODE, _NO_SUCH_SLOT = 1, 2

_SCHEMA = (
    "append(Tensor keys, Tensor values, Tensor slots, Tensor(a!) pages, int[] layout, Tensor? rows=None, "
    "Tensor? head_scales=None, Tensor(b!)? clipped=None) -> ()"
)


def append_tokens(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pages: Tensor,
    layout: tuple[int, ...],
    rows: Tensor | None = None,
    head_scales: Tensor | None = None,
    clipped: Tensor | None = None,
) -> bool:
    """Quantize tokens and store them at their slots, in one pass; all tensors on the CPU.

    Work is split over as many threads as torch uses. Bytes are those of `formats.codec.Codec`; where a Hadamard
    matrix turns the numbers first, up to the rounding of its sums.

    Args:
        keys: `[num_tokens, n_kv_heads, head_dim]`, a type of `NUMBER_TYPES`, the last axis dense.
        values: `[num_tokens, n_kv_heads, value_dim]`, the same type.
        slots: int64 `[num_stored]`, no repeats; a slot below 0 stores nothing.
        pages: uint8 `[num_pages, page_bytes]`, dense; written.
        layout: the page layout as a struct of int64.
        rows: int64 `[num_stored]`, which of the tokens are stored; None = all.
        head_scales: float32 `[2, n_kv_heads]`, scales of keys and of values that are not stored; None = 1.
        clipped: int64 `[2]`; how many keys and values lay beyond the range of such scales is added to it.

    Returns:
        Whether the tokens are stored; False, and nothing changed, where there is no code for this.

    Raises:
        ShapeError: if keys or values do not fit the layout or there are too few of them, or a slot lies beyond the
            pages.
    """
    function, number_type = page_kernel("append"), NUMBER_TYPES.get(keys.dtype)
    if function is None or number_type is None or values.dtype != keys.dtype:
        return False
    key_strides, value_strides = keys.stride(), values.stride()
    if (key_strides[-1] != 1 and layout[KEY_DIM]) or (value_strides[-1] != 1 and layout[VALUE_DIM]):
        return False
    num_tokens, heads = keys.shape[0], layout[N_KV_HEADS]
    if keys.shape[1:] != (heads, layout[KEY_DIM]) or values.shape != (num_tokens, heads, layout[VALUE_DIM]):
        raise ShapeError(
            f"keys and values must be [num_tokens, {heads}, {layout[KEY_DIM]}] and [num_tokens, {heads}, "
            f"{layout[VALUE_DIM]}] for these pages, got {list(keys.shape)} and {list(values.shape)}"
        )
    slots, rows = slots.contiguous(), None if rows is None else rows.contiguous()
    num_slots = slots.shape[0]
    if num_slots != (num_tokens if rows is None else rows.shape[0]):
        raise ShapeError(f"{num_tokens if rows is None else len(rows)} tokens need a slot each, got {num_slots} slots")
    call = _CALL.pack(
        number_type,
        keys.data_ptr(),
        key_strides[0],
        key_strides[1],
        values.data_ptr(),
        value_strides[0],
        value_strides[1],
        num_slots,
        slots.data_ptr(),
        address(rows),
        pages.data_ptr(),
        pages.shape[1],
        pages.shape[0],
        layout_address(layout),
        address(head_scales),
        address(clipped),
        torch.get_num_threads(),
    )
    result = function(call)
    if result == _NO_SUCH_SLOT:
        raise ShapeError(f"slots must be below {len(pages) * layout[0]}, which {len(pages)} pages have")
    return result != _NO_CODE


def _operator(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pages: Tensor,
    layout: Sequence[int],
    rows: Tensor | None = None,
    head_scales: Tensor | None = None,
    clipped: Tensor | None = None,
) -> None:
    if not append_tokens(keys, values, slots, pages, tuple(layout), rows, head_scales, clipped):
        raise BackendUnavailable(
            "the CPU kernels have no code for these pages here: store tokens through their codec, or install g++ if a "
            "notice says that kernels are not compiled"
        )


def _nothing(*arguments: object, **options: object) -> None:
    """What the operator returns."""


_library = torch.library.Library("kvcfg", "FRAGMENT")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("append", _operator, "CPU")
torch.library.register_fake("kvcfg::append", _nothing, lib=_library)
