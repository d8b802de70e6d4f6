"""What is timed is right: every case of every kind of pages is near the reference, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch

import kvcfg
from kvcfg.attention import causal, reference
from kvcfg.evaluation import kernel_cases as cases
from kvcfg.evaluation.kernel_cases import KernelCase
from kvcfg.evaluation.kernel_pages import KernelPages
from kvcfg.evaluation.kernel_shapes import kernel_shapes
from kvcfg.kernels.cpu.loader import load_kernel

pytestmark = pytest.mark.usefixtures("small_memory")

needs_kernels = pytest.mark.skipif(load_kernel("pages") is None, reason="kernels cannot be compiled here")


def pages_of(*overrides: str, batch_size: int = 3, context: int = 200) -> KernelPages:
    experiment = kvcfg.compose(["devices=cpu", "cache.kv_cache_page_size=32", *overrides])
    return KernelPages(kernel_shapes(experiment)[0], batch_size, context)


def cases_of(*overrides: str, **sizes: int) -> dict[tuple[str, int], KernelCase]:
    found = list(cases.kernel_cases(pages_of(*overrides, **sizes)))
    return {(case.kernel, case.new_tokens): case for case in found}


@needs_kernels
@pytest.mark.parametrize("context", [1, 31, 32, 33, 200])
@pytest.mark.parametrize(
    "asked",
    [
        ["cache.kv_cache_format=float32"],
        ["cache.kv_cache_format=int8"],
        ["cache.kv_cache_format=float8_e4m3fn", "model.dtype=float32"],
        ["quantization=bits4"],
        ["model=gemma-3-1b"],
        ["model=deepseek-v2-lite"],
        ["model=tiny", "model.dtype=float16"],
    ],
    ids="-".join,
)
def test_every_case_is_near_the_reference(asked: list[str], context: int) -> None:
    for case in cases_of(*asked, context=context).values():
        assert case.error is not None and case.error < 6e-3, case.kernel


@pytest.mark.parametrize("asked", ["bits4", "bits3", "bits2", "bits4_calibrated", "fp8_unit"])
def test_every_case_can_be_called_again_and_again(asked: str) -> None:
    for case in cases_of(f"quantization={asked}").values():
        for call in (case.compiled, case.torch):
            for _ in range(3 * (call is not None)):
                assert call is not None
                call()


def test_pages_that_kernels_do_not_read_are_left_to_torch() -> None:
    found = cases_of("quantization=bits3")
    assert found["decode", 1].compiled is None and found["decode", 1].error is None


@needs_kernels
def test_kernel_that_reads_other_pages_is_far_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cases.attend_compiled

    def shifted(queries: torch.Tensor, view: object, reach: object, **options: float) -> object:
        view.tables[:] = view.tables.roll(1, 0)  # type: ignore[attr-defined]
        output = honest(queries, view, reach, **options)  # type: ignore[arg-type]
        view.tables[:] = view.tables.roll(-1, 0)  # type: ignore[attr-defined]
        return output

    monkeypatch.setattr(cases, "attend_compiled", shifted)
    error = cases_of("cache.kv_cache_format=int8")["decode", 1].error
    assert error is not None and error > 0.1


@needs_kernels
def test_error_of_a_prefill_is_that_of_queries_from_its_first_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cases.attend_compiled

    def off(queries: torch.Tensor, view: object, reach: object, **options: float) -> torch.Tensor:
        output = honest(queries, view, reach, **options)  # type: ignore[arg-type]
        assert output is not None
        output[0] += 1
        return output

    monkeypatch.setattr(cases, "attend_compiled", off)
    case = cases_of("cache.kv_cache_format=int8")["prefill", 200]
    assert case.error is not None and case.error > 0.1


@needs_kernels
def test_kernel_that_stores_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcfg.cache.storage.PagedStorage.put", lambda *arguments: True)
    error = cases_of("cache.kv_cache_format=int8")["append", 1].error
    assert error is not None and error > 0.1


def test_bytes_are_those_of_whole_contexts_and_of_what_is_stored() -> None:
    found = cases_of("cache.kv_cache_format=int8", batch_size=3, context=200)
    token = 2 * 3 * (64 + 4)  # keys and values of three heads, a float32 scale each
    assert found["decode", 1].nbytes == 3 * 200 * token
    assert found["prefill", 200].nbytes == 200 * token
    assert found["append", 1].nbytes == 3 * token


def test_pages_that_close_are_read_open_in_their_last_page() -> None:
    pages = pages_of("quantization=bits4", batch_size=3, context=200)
    group = pages.shape.params
    opened = 8 * group.open_pages.bytes_per_layer_page / 32
    assert pages.closed_tokens == 192 and pages.sequence_bytes == 6 * group.bytes_per_layer_page + opened
    assert cases.chunk_tokens(pages) == 8


def test_chunk_of_a_prompt_is_less_where_torch_would_need_much_memory() -> None:
    shape = pages_of("model=llama-3.1-405b", "cache.kv_cache_format=int8", batch_size=1, context=4096)
    assert cases.chunk_tokens(shape) == 32


def test_slots_are_all_those_of_the_pages_once() -> None:
    pages = pages_of("cache.kv_cache_format=int8", batch_size=3, context=200)
    slots = torch.cat(pages.slots(3, 10))
    assert len(slots.unique()) == 600 and int(slots.max()) < pages.storage.num_pages * 32


def test_layers_are_more_than_caches_hold(small_memory: int) -> None:
    assert pages_of("cache.kv_cache_format=int8").storage.nbytes >= small_memory


def test_layers_hold_the_same_so_that_each_can_be_checked_for_all() -> None:
    pages = pages_of("quantization=bits4", "model=tiny")
    step, reach = pages.step(3, 1), causal([199] * 3, [1] * 3)
    queries = pages.queries(3)
    first, *others = [reference.attend(queries, view, reach, scale=0.25) for view in pages.views(step)[:4]]
    assert first.isfinite().all() and all(torch.equal(first, other) for other in others)
