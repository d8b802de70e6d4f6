"""What was measured of the kernels: a row for each, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvcfg.results.table import aligned
from kvcfg.units import readable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One kernel on pages of one shape and format, beside torch and, where it is installed, vLLM.

    Attributes:
        kernel: decode, prefill, append or close.
        compiled: whether there is a kernel for these pages; else the torch path is what runs, and was timed.
        model: whose layers these are.
        shape: query heads / KV heads / head_dim of a layer on one device, and its window.
        format: element format; keys/values where they differ.
        recipe: how pages are stored, in words.
        page_size: tokens of a page.
        batch_size: sequences of a call; pages, of close.
        new_tokens: of each sequence, queries or tokens stored.
        context: tokens that the last query sees; None where nothing is read.
        nbytes: bytes of pages that a call reads, or writes.
        ms: median milliseconds of a call.
        gb_per_s: nbytes over that time.
        read_gb_per_s: bytes that memory was read with in order, in the same rounds on the same threads.
        share: gb_per_s / read_gb_per_s.
        error: relative L2 distance to the reference on the same pages; None without a kernel.
        torch_ms: median of the same work in torch.
        torch_ratio: torch_ms / ms, how many times as fast as torch; None without a kernel.
        vllm_ms: median of vLLM's, in bfloat16; None where it is not installed, or has no such kernel.
        vllm_ratio: vllm_ms / ms, how many times as fast as vLLM.
        threads: threads of torch.
        cpu: name of the processor.
        versions: of Python and the libraries.
    """

    kernel: str
    compiled: bool
    model: str
    shape: str
    format: str
    recipe: str
    page_size: int
    batch_size: int
    new_tokens: int
    context: int | None
    nbytes: int
    ms: float
    gb_per_s: float
    read_gb_per_s: float
    share: float
    error: float | None
    torch_ms: float
    torch_ratio: float | None
    vllm_ms: float | None
    vllm_ratio: float | None
    threads: int
    cpu: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


def kernel_table(rows: Sequence[KernelRow]) -> str:
    """Rows as one aligned plain-text table, with lines that say what to compare the figures with."""
    models = dict.fromkeys(row.model for row in rows)
    has_vllm = any(row.vllm_ratio is not None for row in rows)
    header = ["kernel", "heads", "format", "page", "tokens", "bytes", "ms", "GB/s", "of read", "error", "× torch"]
    lines = [header + ["× vLLM"] * has_vllm]
    lines += [_cells(row) + [_times(row.vllm_ratio)] * has_vllm for row in rows]
    if len(models) > 1:
        lines = [[name, *line] for name, line in zip(["model", *(row.model for row in rows)], lines, strict=True)]
    return "\n".join([*aligned(lines, num_left=2 + (len(models) > 1) + 1), "", *_notes(rows, has_vllm)])


def _cells(row: KernelRow) -> list[str]:
    return [
        f"{row.kernel}{'' if row.compiled else ' *'}",
        row.shape,
        row.format,
        str(row.page_size),
        _tokens(row),
        readable_bytes(row.nbytes),
        f"{row.ms:.3g}",
        f"{row.gb_per_s:.2f}",
        f"{row.share:.0%}",
        _error(row.error),
        _times(row.torch_ratio),
    ]


def _tokens(row: KernelRow) -> str:
    if row.context is None:
        return f"{row.batch_size} × {row.new_tokens}"
    if row.new_tokens == 1:
        return f"{row.batch_size} × {row.context}"
    return f"{row.new_tokens} of {row.context}"


def _error(error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.1e}" if error else "0"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}"


def _notes(rows: Sequence[KernelRow], has_vllm: bool) -> list[str]:
    """What the columns mean, and where it was measured."""
    if not rows:
        return []
    first = rows[0]
    speeds = sorted(row.read_gb_per_s for row in rows)
    span = " to ".join(dict.fromkeys(f"{speed:.1f}" for speed in (speeds[0], speeds[-1])))
    threads = f"{first.threads} thread{'s' * (first.threads != 1)}"
    named = " ".join(f"{name} {number}" for name, number in first.versions.items() if name in ("torch", "vllm"))
    return [
        *(
            []
            if all(row.compiled for row in rows)
            else ["*: no compiled kernel here for these pages; torch was timed."]
        ),
        f"{first.cpu}, {threads}, {named}; memory is read in order with {span} GB/s: `of read` is the share of that.",
        "error: to the reference on the same pages. × torch: times as fast as plain torch on the same pages"
        + ("; × vLLM: as its bfloat16." if has_vllm else "."),
    ]
