"""The kernels of an experiment's own layers and formats, on random tokens: no model is needed."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from kvcfg.config.devices import detect
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.machine import available_memory
from kvcfg.errors import CapacityError, ConfigError, KvcfgError, Problem
from kvcfg.evaluation.kernel_cases import KernelCase, kernel_cases
from kvcfg.evaluation.kernel_pages import KernelPages
from kvcfg.evaluation.kernel_rows import KernelRow
from kvcfg.evaluation.kernel_shapes import KernelShape, kernel_shapes
from kvcfg.evaluation.kernel_vllm import vllm_calls, vllm_version
from kvcfg.evaluation.memory_reader import MemoryReader, cold_bytes
from kvcfg.evaluation.progress import progress_bar
from kvcfg.evaluation.turns import Turn, take_turns
from kvcfg.units import ceil_div, readable_bytes
from kvcfg.version import __version__

ROUNDS = 5

LARGEST_ERROR = 1e-2
"""Relative L2 distance to the reference that is let pass: kernels round, and a wrong one is far off."""


@torch.no_grad()
def measure_kernels(
    experiment: ExperimentConfig, *, batch_size: int = 8, context: int = 4096, rounds: int = ROUNDS
) -> list[KernelRow]:
    """Check and time the kernels on pages like the experiment's, beside torch and, where it is installed, vLLM.

    Args:
        experiment: whose layers and formats are taken.
        batch_size: sequences of a decode step.
        context: tokens of each; no more than a window, or the model's context, has.
        rounds: how often everything has its turn; figures are medians.

    Raises:
        ConfigError: if the experiment is for GPUs, whose kernels these are not, or keeps no pages.
        CapacityError: if there is no memory for the pages.
        KvcfgError: if a kernel is not what the reference computes; nothing is timed then.
    """
    if not has_kernels(experiment):
        rule = "asks for GPUs, and compiled kernels are the CPU's; these layers and formats can be timed there"
        raise ConfigError(Problem("devices", rule, experiment.devices.name, "devices=cpu"))
    shapes = kernel_shapes(experiment)
    if not shapes:
        raise ConfigError(Problem("model", "has no layers that keep pages", experiment.model.name))
    reader = MemoryReader()
    rows = list[KernelRow]()
    for shape in shapes:
        tokens = min(context, experiment.model.max_seq_len, shape.window or context)
        recipe = shape.params.storage
        _check_memory(shape, batch_size, tokens)
        title = f"kernels: heads {shape}, {recipe.format_name}, pages of {shape.params.page_size}"
        with progress_bar(title, rounds + 1) as step_done:
            pages = KernelPages(shape, batch_size, tokens)
            taken = [_Taken(case, shape, reader) for case in map(partial(_checked, shape), kernel_cases(pages))]
            step_done()
            read = Turn(reader)
            take_turns([read, *(turn for item in taken for turn in item.turns)], rounds, step_done)
        read_gb_per_s = _gb_per_s(reader.memory.nbytes, read.seconds)
        rows += [item.row(experiment.model.name, read_gb_per_s) for item in taken]
    return rows


def has_kernels(experiment: ExperimentConfig) -> bool:
    """Whether what the experiment asks for runs on a CPU, whose kernels these are."""
    return detect(experiment.devices).kind == "cpu"


def _check_memory(shape: KernelShape, batch_size: int, context: int) -> None:
    """Raise CapacityError if this machine has no memory for the pages of two layers."""
    params, free = shape.params, available_memory()
    of_each = 2 * ceil_div(context, params.page_size) * params.bytes_per_layer_page
    needed, room = cold_bytes() + batch_size * of_each, free - cold_bytes()
    if needed > free:
        fix = f"batch_size={room // of_each}" if room >= of_each else f"batch_size=1 context={ceil_div(context, 4)}"
        raise CapacityError(
            f"two layers of {batch_size} × {context} tokens, heads {shape}, take {readable_bytes(needed)}, and "
            f"{readable_bytes(free)} are free. Try: {fix}"
        )


def _checked(shape: KernelShape, case: KernelCase) -> KernelCase:
    """The same case, whose kernel is what it should be."""
    if case.error is not None and not case.error <= LARGEST_ERROR:
        raise KvcfgError(
            f"{case.kernel} of {shape.params.storage} for heads {shape} is {case.error:.1e} away from the "
            "reference: nothing was timed. Please report it, with your CPU; KVCFG_CPU=portable does without its "
            "newer instructions"
        )
    return case


class _Taken:
    """A case with the turns that time it: the kernel's, torch's and vLLM's."""

    def __init__(self, case: KernelCase, shape: KernelShape, reader: MemoryReader) -> None:
        self._case, self._shape = case, shape
        self._compiled = None if case.compiled is None else Turn(case.compiled)
        self._torch = Turn(case.torch)
        self._vllm = [Turn(call) for call in vllm_calls(shape, case, reader.memory)]

    @property
    def turns(self) -> list[Turn]:
        return [*([] if self._compiled is None else [self._compiled]), self._torch, *self._vllm]

    def row(self, model: str, read_gb_per_s: float) -> KernelRow:
        case, params = self._case, self._shape.params
        seconds = (self._compiled or self._torch).seconds
        vllm = min((turn.seconds for turn in self._vllm), default=None)
        gb_per_s = _gb_per_s(case.nbytes, seconds)
        return KernelRow(
            kernel=case.kernel,
            compiled=self._compiled is not None,
            model=model,
            shape=str(self._shape),
            format=params.storage.format_name,
            recipe=str(params.storage),
            page_size=params.page_size,
            batch_size=case.batch_size,
            new_tokens=case.new_tokens,
            context=case.context,
            nbytes=case.nbytes,
            ms=1e3 * seconds,
            gb_per_s=gb_per_s,
            read_gb_per_s=read_gb_per_s,
            share=gb_per_s / read_gb_per_s,
            error=case.error,
            torch_ms=1e3 * self._torch.seconds,
            torch_ratio=self._torch.seconds / seconds if self._compiled else None,
            vllm_ms=None if vllm is None else 1e3 * vllm,
            vllm_ratio=None if vllm is None else vllm / seconds,
            threads=torch.get_num_threads(),
            cpu=cpu_name(),
            versions=_versions(),
        )


def _gb_per_s(nbytes: int, seconds: float) -> float:
    return nbytes / seconds / 1e9


def cpu_name() -> str:
    """What the processor calls itself."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "kvcfg": __version__, "torch": version("torch")}
    return own | ({"vllm": found} if (found := vllm_version()) else {})
