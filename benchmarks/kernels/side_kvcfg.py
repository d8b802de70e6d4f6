"""kvcfg's kernels: pages as `PagedStorage` writes them, read and written through plain C calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from memory import POOL_BYTES, repeated
from shapes import Shape
from torch import Tensor

from kvcfg.attention.reach import Reach
from kvcfg.cache.storage import KeysValues, PagedStorage
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.presets import preset_values
from kvcfg.config.recipes import resolve_recipe
from kvcfg.dtypes import DeviceRef
from kvcfg.formats import Recipe
from kvcfg.kernels.cpu.append import append_tokens
from kvcfg.kernels.cpu.attend import attend_pages
from kvcfg.params import KVCacheParams

FORMATS = {
    "bf16": ("bfloat16", "default"),
    "fp8": ("float8_e4m3fn", "default"),
    "int8": ("int8", "default"),
    "gauss4": (None, "bits4"),
    "float32": ("float32", "default"),
}
"""`cache.kv_cache_format` and `quantization` of each."""

UNSCALED = {"bf16": torch.bfloat16, "float32": torch.float32}
"""Formats whose pages are numbers and nothing else, so that all page sizes share one memory."""

_SAMPLE_PAGES = 64


class NoCodeError(RuntimeError):
    """The kernels do not read, or write, pages of a format here."""


class Pages:
    """Pages of one layer, and the kernels' calls on them.

    Args:
        shape: heads of the layer.
        name: a key of FORMATS.
        page_size: tokens per page.
        num_pages: pages that are allocated.
    """

    def __init__(self, shape: Shape, name: str, page_size: int, num_pages: int = _SAMPLE_PAGES) -> None:
        self.shape, self.page_size = shape, page_size
        self.query_type = torch.float32 if name == "float32" else torch.bfloat16
        recipe = recipe_of(name)
        params = KVCacheParams(
            dtype=recipe.key_format.dtype,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            num_layers=1,
            devices=[DeviceRef.CPU()],
            page_size=page_size,
            recipe=recipe,
        )
        self.closes, self.page_bytes = params.closes_pages, params.bytes_per_layer_page
        self.storage = PagedStorage(params, num_pages, [torch.device("cpu")])
        self.layer = self.storage.layer_pages(0, 0, shape.head_dim)
        if self.layer.layout is None:
            raise NoCodeError(f"kernels read no pages of {recipe}")

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store tokens `[num_tokens, n_kv_heads, head_dim]`, whole pages of them, in the first pages."""
        count = len(keys) // self.page_size
        if self.closes:
            keys, values = (item.unflatten(0, (count, self.page_size)) for item in (keys, values))
        self.storage.store(0, self.storage.encode(0, keys, values), torch.arange(len(keys)))

    def stored(self, pages: Tensor) -> KeysValues:
        """The numbers of some pages `[n]`, decoded by their codec."""
        return self.storage.read(0, pages.long(), torch.float32)

    def pool(self) -> Tensor:
        """Enough pages `[num_pages, page_bytes]` for cold caches; real ones, which repeat."""
        heads = (_SAMPLE_PAGES * self.page_size, self.shape.n_kv_heads, self.shape.head_dim)
        generator = torch.Generator().manual_seed(0)
        self.fill(torch.randn(heads, generator=generator), torch.randn(heads, generator=generator))
        return repeated(self.layer.arena[:_SAMPLE_PAGES], POOL_BYTES // self.page_bytes)

    def reader(self, arena: Tensor, tables: Iterator[Tensor], queries: Tensor, reach: Reach) -> Callable[[], Tensor]:
        """Attends over the pages of the next page table."""
        layer, scale = self.layer, self.shape.scale

        def read() -> Tensor:
            found = attend_pages(
                queries,
                reach.query_starts,
                reach.first,
                reach.stop,
                arena,
                next(tables),
                layer.ints,
                layer.levels,
                layer.head_scales,
                scale=scale,
            )
            if found is None:
                raise NoCodeError("kvcfg_attend has no code for this")
            return found

        return read

    def writer(self, arena: Tensor, slots: Iterator[Tensor], keys: Tensor, values: Tensor) -> Callable[[], None]:
        """Stores tokens at the next slots."""
        ints, scales = self.layer.ints, self.layer.head_scales

        def write() -> None:
            if not append_tokens(keys, values, next(slots), arena, ints, head_scales=scales):
                raise NoCodeError("kvcfg_append has no code for this")

        return write


def recipe_of(name: str) -> Recipe:
    """The recipe that a user gets who asks for this format."""
    cache_format, quantization = FORMATS[name]
    asked = {
        "model": preset_values("model")["llama-3.1-8b"],
        "cache": {"kv_cache_format": cache_format},
        "quantization": preset_values("quantization")[quantization],
    }
    return resolve_recipe(ExperimentConfig.model_validate(asked))
