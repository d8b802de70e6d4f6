"""The table of element formats: what a plan must know of each one, without torch.

A format says how one number of a key or value is stored (`int8`: 8 bits, up to 127). A recipe says how
a page of them is stored: which format for keys and which for values, and how many numbers share a scale.
`x = q * scale` on the way back, always.

    granularity   numbers that share one scale                 scales of a page, per head
    none          no scale: the format holds the numbers as they are            0
    tensor        all of them; the scale is 1, so none is stored                0
    head          all of a head; the scale is 1, so none is stored              0
    token_head    the head_dim numbers of one token in one head                 page_size
    block         `block_size` of those numbers                                 page_size * head_dim / block_size

The codec of a format (quantize, dequantize) lives in the file named by `codec` and needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError, Problem, nearest, one_of
from kvcfg.units import ceil_div

Granularity = Literal["none", "tensor", "head", "token_head", "block"]
ScaleSource = Literal["unit", "dynamic"]
ScaleDType = Literal["float32", "bfloat16", "float16", "float8_e8m0fnu"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
SCALE_DTYPES: tuple[ScaleDType, ...] = get_args(ScaleDType)


@dataclass(frozen=True, slots=True)
class Format:
    """Facts about one element format.

    Attributes:
        name: the value of `cache.kv_cache_format`.
        dtype: what one stored element is.
        max_value: largest magnitude that can be stored.
        scaled: whether numbers are divided by a scale before they are stored.
        codec: "module:function" that quantizes and dequantizes; needs torch.
    """

    name: str
    dtype: DType
    max_value: float
    scaled: bool
    codec: str

    @property
    def bits(self) -> int:
        """Bits of one stored element, without scales."""
        return self.dtype.size_in_bits

    def value_bytes(self, num_elements: int) -> int:
        """Bytes that hold `num_elements` packed elements."""
        return num_elements * self.bits // 8

    def page_bytes(
        self,
        page_size: int,
        n_heads: int,
        k_dim: int,
        v_dim: int,
        granularity: Granularity,
        scale_dtype: DType,
        block_size: int | None = None,
    ) -> int:
        """Bytes of one layer's page with keys and values in this format, scales included."""
        recipe = Recipe(self, self, granularity, "dynamic", scale_dtype, block_size)
        return recipe.page_bytes(page_size, n_heads, k_dim, v_dim)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the pages of one layer group are stored; nothing is left to guess.

    Attributes:
        key_format, value_format: element formats of keys and of values.
        granularity: which numbers share a scale (the table at the top of this file).
        scale_source: `unit` scales are 1 and take no bytes; `dynamic` ones are computed as numbers arrive.
        scale_dtype: what one stored scale is.
        block_size: numbers along head_dim that share a scale; set if and only if granularity is `block`.
    """

    key_format: Format
    value_format: Format
    granularity: Granularity
    scale_source: ScaleSource
    scale_dtype: DType
    block_size: int | None = None

    @property
    def format_name(self) -> str:
        """Name of the element format; keys/values where they differ."""
        return "/".join(dict.fromkeys((self.key_format.name, self.value_format.name)))

    @property
    def is_scaled(self) -> bool:
        """Whether pages hold scales beside the elements."""
        return self.granularity in ("token_head", "block") and (self.key_format.scaled or self.value_format.scaled)

    def scales_per_token(self, element_format: Format, dim: int) -> int:
        """Scales stored for one token in one head of width `dim`, in one of the recipe's formats."""
        if not self.is_scaled or not element_format.scaled or dim == 0:
            return 0
        return 1 if self.block_size is None else ceil_div(dim, self.block_size)

    def value_bytes(self, page_size: int, n_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of the elements of one layer's page."""
        tokens = page_size * n_heads
        return self.key_format.value_bytes(tokens * k_dim) + self.value_format.value_bytes(tokens * v_dim)

    def scale_bytes(self, page_size: int, n_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of the scales of one layer's page."""
        scales = self.scales_per_token(self.key_format, k_dim) + self.scales_per_token(self.value_format, v_dim)
        return page_size * n_heads * scales * self.scale_dtype.size_in_bytes

    def page_bytes(self, page_size: int, n_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of one layer's page, elements and scales: the byte formula of kvcfg."""
        shape = (page_size, n_heads, k_dim, v_dim)
        return self.value_bytes(*shape) + self.scale_bytes(*shape)

    def __str__(self) -> str:
        scales = "" if self.granularity == "none" else f", {self.scale_source} scales per {self.granularity}"
        block = "" if self.block_size is None else f" of {self.block_size}"
        kept = f" in {self.scale_dtype.name}" if self.is_scaled else ""
        return self.format_name + scales + block + kept


FORMATS: dict[str, Format] = {
    item.name: item
    for item in (
        Format("float32", DType.float32, 3.4028234663852886e38, False, "kvcfg.formats.cast:Cast"),
        Format("float16", DType.float16, 65504.0, False, "kvcfg.formats.cast:Cast"),
        Format("bfloat16", DType.bfloat16, 3.3895313892515355e38, False, "kvcfg.formats.cast:Cast"),
        Format("float8_e4m3fn", DType.float8_e4m3fn, 448.0, True, "kvcfg.formats.fp8:FP8"),
        Format("int8", DType.int8, 127.0, True, "kvcfg.formats.int8:Int8"),
    )
}


def find_format(name: str, key: str = "cache.kv_cache_format") -> Format:
    """The format of that name, case aside.

    Raises:
        ConfigError: if there is none; it lists those there are and offers the nearest.
    """
    known = list(FORMATS)
    found = FORMATS.get(name.lower())
    if found is None:
        wanted = name.lower().replace("fp", "float")
        close = next((item for item in known if item.startswith(wanted)), None) or nearest(wanted, known)
        raise ConfigError(Problem(key, one_of(known), name, None if close is None else f"{key}={close}"))
    return found
