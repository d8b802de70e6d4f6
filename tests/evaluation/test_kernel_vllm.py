"""vLLM beside the kernels, played by a package of its name that computes what vLLM does in torch.

It tells that blocks, slots, tables and lengths go together as they are handed over; vLLM itself is not needed here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvcfg
from kvcfg.evaluation import kernel_vllm
from kvcfg.evaluation.kernel_cases import KernelCase, kernel_cases
from kvcfg.evaluation.kernel_pages import KernelPages
from kvcfg.evaluation.kernel_shapes import KernelShape, kernel_shapes

pytestmark = pytest.mark.usefixtures("small_memory")

OPS = """
import torch

def cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa, kv_cache_dtype):
    assert (isa, kv_cache_dtype) == ("vec", "auto") and len(slots) == len(keys) and len(slots.unique()) == len(slots)
    size = key_cache.shape[2]
    key_cache[slots // size, :, slots % size] = keys
    value_cache[slots // size, :, slots % size] = values

def cpu_attn_get_scheduler_metadata(**options):
    assert options["isa"] == "vec" and len(options["seq_lens"]) == options["num_reqs"]
    return torch.zeros(1)

def cpu_attention_with_kv_cache(*, query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, block_table,
                                **options):
    size = key_cache.shape[2]
    for number, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[number:number + 2].tolist()
        ids = block_table[number, :-(-length // size)].long()
        rows = [cache[ids].transpose(1, 2).flatten(0, 1) for cache in (key_cache, value_cache)]
        keys, values = (item[:length].double() for item in rows)
        own = query[begin:end].double().unflatten(1, (keys.shape[1], -1))
        scores = scale * torch.einsum("qhgd,thd->qhgt", own, keys)
        seen = torch.arange(length) <= torch.arange(length - (end - begin), length).unsqueeze(1)
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        output[begin:end] = torch.einsum("qhgt,thd->qhgd", weights, values).flatten(1, 2) * FACTOR
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with a package `vllm`."""
    backends = tmp_path / "vllm" / "v1" / "attention" / "backends"
    backends.mkdir(parents=True)
    for folder in (backends, *list(backends.parents)[:3]):
        (folder / "__init__.py").touch()
    (backends / "cpu_attn.py").write_text("def _get_attn_isa(dtype, block_size, head_dim, kind):\n    return 'vec'\n")
    (tmp_path / "vllm" / "_custom_ops.py").write_text(OPS + "\nFACTOR = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "vllm" / "_custom_ops.py"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out about vLLM, and its modules, before and after."""
    others = [name for name in sys.modules if name.partition(".")[0] == "vllm"]
    for name in others:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    for function in (kernel_vllm.vllm_version, kernel_vllm._agrees):
        function.cache_clear()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    for function in (kernel_vllm.vllm_version, kernel_vllm._agrees):
        function.cache_clear()


def shape_of(model: str = "tiny") -> KernelShape:
    return kernel_shapes(kvcfg.compose([f"model={model}", "devices=cpu"]))[0]


def cases_of(shape: KernelShape) -> dict[tuple[str, int], KernelCase]:
    return {(case.kernel, case.new_tokens): case for case in kernel_cases(KernelPages(shape, 2, 100))}


def memory() -> torch.Tensor:
    return torch.randn(1 << 19, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8)


@pytest.mark.usefixtures("play")
def test_attention_and_writing_are_timed_with_blocks_of_both_sizes() -> None:
    for case in cases_of(shape_of()).values():
        calls = kernel_vllm.vllm_calls(shape_of(), case, memory())
        assert len(calls) == 2
        for call in calls * 3:
            call()


@pytest.mark.usefixtures("play")
def test_queries_of_a_case_see_its_whole_context() -> None:
    case = cases_of(shape_of())["decode", 1]
    output = kernel_vllm.vllm_calls(shape_of(), case, memory())[0]()
    assert isinstance(output, torch.Tensor) and output.shape == (2, 4, 16) and output.isfinite().all()


def test_without_it_there_is_nothing_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_vllm, "find_spec", lambda name: None)
    assert kernel_vllm.vllm_version() is None
    assert kernel_vllm.vllm_calls(shape_of(), cases_of(shape_of())["decode", 1], memory()) == []


def test_version_that_computes_something_else_is_left_out_once(play: Path, caplog: pytest.LogCaptureFixture) -> None:
    play.write_text(OPS + "\nFACTOR = 2\n")
    for case in cases_of(shape_of()).values():
        assert kernel_vllm.vllm_calls(shape_of(), case, memory()) == []
    (message,) = caplog.messages
    assert "is left out for heads 4/2/16: its attention is off by 1.0e+00" in message


def test_version_that_is_called_otherwise_is_left_out(play: Path, caplog: pytest.LogCaptureFixture) -> None:
    play.write_text("def cpu_attn_reshape_and_cache(one):\n    pass\n")
    assert kernel_vllm.vllm_calls(shape_of(), cases_of(shape_of())["decode", 1], memory()) == []
    assert "TypeError" in caplog.text


@pytest.mark.usefixtures("play")
def test_latents_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    shape = shape_of("deepseek-v2-lite")
    assert kernel_vllm.vllm_calls(shape, cases_of(shape)["decode", 1], memory()) == []
    assert "no latents" in caplog.text
