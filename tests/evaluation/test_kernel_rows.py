"""The table of kernels: columns that have something to say, and lines that say what to compare figures with."""

from __future__ import annotations

from typing import Any

from kvcfg.evaluation.kernel_rows import KernelRow, kernel_table


def row_of(**changes: Any) -> KernelRow:
    base: dict[str, Any] = {
        "kernel": "decode",
        "compiled": True,
        "model": "tiny",
        "shape": "4/2/16",
        "format": "int8",
        "recipe": "int8, dynamic scales per token_head in float32",
        "page_size": 128,
        "batch_size": 8,
        "new_tokens": 1,
        "context": 4096,
        "nbytes": 13 << 20,
        "ms": 1.5,
        "gb_per_s": 9.0,
        "read_gb_per_s": 30.0,
        "share": 0.3,
        "error": 1.7e-3,
        "torch_ms": 45.0,
        "torch_ratio": 30.0,
        "vllm_ms": None,
        "vllm_ratio": None,
        "threads": 1,
        "cpu": "CPU of this test",
        "versions": {"python": "3.11.7", "kvcfg": "0.1", "torch": "2.13.0"},
    }
    return KernelRow(**{**base, **changes})


def test_decode_says_sequences_and_their_tokens() -> None:
    line = kernel_table([row_of()]).splitlines()[2]
    assert " ".join(line.split()) == "decode 4/2/16 int8 128 8 × 4096 13 MiB 1.5 9.00 30% 1.7e-03 30"


def test_prefill_says_which_part_of_its_context_is_new() -> None:
    assert "512 of 4096" in kernel_table([row_of(kernel="prefill", batch_size=1, new_tokens=512)])


def test_append_says_sequences_and_new_tokens() -> None:
    assert "1 × 512" in kernel_table([row_of(kernel="append", batch_size=1, new_tokens=512, context=None)])


def test_column_of_vllm_is_left_out_where_it_was_not_timed() -> None:
    assert "vLLM" not in kernel_table([row_of()])


def test_column_of_vllm_is_empty_for_what_it_has_not() -> None:
    timed = row_of(vllm_ms=3.0, vllm_ratio=2.0, versions={"torch": "2.13.0", "vllm": "0.32.0"})
    header, _, first, second, *notes = kernel_table([timed, row_of(kernel="close")]).splitlines()
    assert header.endswith("× vLLM") and first.endswith("  2") and not second.endswith("2")
    assert any("vllm 0.32.0" in note for note in notes)


def test_pages_without_a_kernel_are_marked_and_explained() -> None:
    table = kernel_table([row_of(compiled=False, error=None, torch_ratio=None)])
    assert "decode *" in table and "\n*: no compiled kernel" in table


def test_mark_is_not_explained_where_there_is_none() -> None:
    assert "*:" not in kernel_table([row_of()])


def test_models_of_a_sweep_are_told_apart() -> None:
    table = kernel_table([row_of(), row_of(model="other")])
    assert table.startswith("model") and "other  decode" in table


def test_exact_result_has_no_error() -> None:
    assert kernel_table([row_of(error=0.0)]).splitlines()[2].split()[-2] == "0"


def test_bandwidths_of_several_runs_are_a_span() -> None:
    assert "with 29.5 to 30.0 GB/s" in kernel_table([row_of(), row_of(read_gb_per_s=29.5)])
