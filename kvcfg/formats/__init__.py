"""The table of element formats: what a plan must know of each one, without torch.

A format says how one number of a key or value is stored (`int8`: 8 bits, up to 127). A recipe says how
a page of them is stored: which format for keys and which for values, and how many numbers share a scale.
On the way back always

    x = q * scale            or, in the asymmetric formats, which store a zero beside each scale,
    x = q * scale + zero

    granularity   numbers that share one scale                            scales of a page, per head
    none          no scale: the format holds the numbers as they are      0
    tensor        all of them; the scale is 1 or calibrated, not stored   0
    head          all of a head; likewise                                 0
    token_head    the head_dim numbers of one token in one head           page_size
    block         `block_size` of those numbers                           page_size * head_dim / block_size
    channel       one number of each of `block_size` tokens (null: of     head_dim * page_size / block_size
                  all tokens of the page), per head

    format              levels of one number                                     bits
    float32 … bfloat16  those of the type                                        32, 16
    float8_*, int8      those of the type, -127 to 127                           8
    int6 … int2         whole numbers, -31 to 31 … -1 to 1                       6 … 2
    uint6 … uint2       whole numbers, 0 to 63 … 0 to 3, above a stored zero     6 … 2
    gauss6 … gauss2     the 64 … 4 levels that suit a normal distribution best   6 … 2
    float4_e2m1fn       0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives           4

What is stored need not be the numbers themselves, but what a transform makes of them:

    transform   keys                                                      values
    none        as they are                                               as they are
    hadamard    turned by a Hadamard matrix: outliers spread over a head  the same
    centred     less the mean of their page, which is stored, and turned  turned
    balanced    the same, by a calibrated matrix instead                  turned by a Hadamard matrix

The first tokens of a sequence draw most attention, and are unlike all others. Where keys are centred, the first
`sink_tokens` tokens of every page are left out of the mean, and their keys and values kept in int8: of every page, so
that pages can be shared and moved whatever sequence they came from.

NVFP4 is a recipe of float4_e2m1fn: blocks of 16 with float8_e4m3fn scales (without the second scale per tensor
that hardware adds, which keys and values do not need: their block scales fit e4m3). mxfp4 is another: blocks of
32 with float8_e8m0fnu scales. Elements below 8 bits are packed without gaps, whole bytes for every head_dim that
is a multiple of 8.

The codec of a format lives in the file named by `codec` and needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError, Problem, nearest, one_of
from kvcfg.units import ceil_div

Granularity = Literal["none", "tensor", "head", "token_head", "block", "channel"]
ScaleSource = Literal["unit", "static", "dynamic"]
ScaleDType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu"]
Transform = Literal["none", "hadamard", "centred", "balanced"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
SCALE_DTYPES: tuple[ScaleDType, ...] = get_args(ScaleDType)
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)

STORED_SCALES: tuple[Granularity, ...] = ("token_head", "block", "channel")
"""Granularities whose scales are computed from the numbers and stored beside them."""

CENTRED: tuple[Transform, ...] = ("centred", "balanced")
"""Transforms that take the mean of a page from its keys."""

PACKED_MULTIPLE = 8
"""What head_dim must be a multiple of for elements below 8 bits, so that every token fills whole bytes."""


@dataclass(frozen=True, slots=True)
class Format:
    """Facts about one element format.

    Attributes:
        name: the value of `cache.kv_cache_format`.
        dtype: what one stored element is; uint8 where several are packed into bytes.
        bits: bits of one stored element, without scales.
        max_value: largest magnitude that can be stored, in units of the scale.
        scaled: whether numbers are divided by a scale before they are stored.
        codec: "module:class" that rounds, packs and reads elements; needs torch.
        asymmetric: whether a zero is stored beside each scale, of the same type.
    """

    name: str
    dtype: DType
    bits: int
    max_value: float
    scaled: bool
    codec: str
    asymmetric: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether elements are smaller than a byte."""
        return self.bits < 8

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
class SideRecipe:
    """How the keys, or the values, of a page are stored.

    Attributes:
        element_format: how one number is stored.
        granularity: which numbers share a scale (the table at the top of this file).
        block_size: numbers along head_dim (`block`) or tokens (`channel`) that share one scale.
        scale_dtype: what one stored scale is, and a stored zero.
        transform: what is done to the numbers before they are stored (the table at the top of this file).
        sink_tokens: first tokens of a page that are kept in int8.
    """

    element_format: Format
    granularity: Granularity
    block_size: int | None
    scale_dtype: DType
    transform: Transform = "none"
    sink_tokens: int = 0

    @property
    def is_scaled(self) -> bool:
        """Whether scales are stored beside the elements."""
        return self.element_format.scaled and self.granularity in STORED_SCALES

    @property
    def shares_scales(self) -> bool:
        """Whether tokens share scales."""
        return self.is_scaled and self.granularity == "channel"

    @property
    def is_centred(self) -> bool:
        """Whether the mean of a page is stored beside its tokens."""
        return self.transform in CENTRED

    @property
    def spans_tokens(self) -> bool:
        """Whether tokens share something, so that they can only be stored together."""
        return self.shares_scales or self.is_centred or self.sink_tokens > 0

    def scales_per_token(self, dim: int) -> int:
        """Scales that belong to one token in one head of width `dim`; 0 where tokens share them."""
        if not self.is_scaled or self.shares_scales or dim == 0:
            return 0
        return 1 if self.block_size is None else ceil_div(dim, self.block_size)

    def num_scales(self, tokens: int, n_heads: int, dim: int) -> int:
        """Scales of `tokens` tokens that are stored together; zeros are not counted."""
        if self.shares_scales:
            return ceil_div(tokens, self.block_size or tokens) * n_heads * dim
        return tokens * n_heads * self.scales_per_token(dim)

    def own_tokens(self, tokens: int) -> int:
        """Of `tokens` tokens that are stored together those that are not kept in int8."""
        return tokens - self.sink_tokens

    def element_bytes(self, tokens: int, n_heads: int, dim: int) -> int:
        """Bytes of the elements of `tokens` tokens that are stored together, sinks left out."""
        return self.element_format.value_bytes(self.own_tokens(tokens) * n_heads * dim)

    def scale_bytes(self, tokens: int, n_heads: int, dim: int) -> int:
        """Bytes of the scales, zeros, means and sinks of `tokens` tokens that are stored together."""
        parts = 2 if self.element_format.asymmetric else 1
        numbers = self.num_scales(self.own_tokens(tokens), n_heads, dim) * parts + n_heads * dim * self.is_centred
        return numbers * self.scale_dtype.size_in_bytes + self.sink_bytes(n_heads, dim)

    def sink_bytes(self, n_heads: int, dim: int) -> int:
        """Bytes of the sinks of a page, with their scales."""
        if not self.sink_tokens:
            return 0
        return SINK.element_bytes(self.sink_tokens, n_heads, dim) + SINK.scale_bytes(self.sink_tokens, n_heads, dim)

    def problems(self, dim: int, tokens: int | None) -> list[Problem]:
        """What stands against storing heads of width `dim` like this, `tokens` at a time (None = one by one)."""
        if dim == 0:
            return []
        found, name = [], self.element_format.name
        if self.element_format.is_packed and dim % PACKED_MULTIPLE:
            rule = f"packs whole bytes, so that head_dim must be a multiple of {PACKED_MULTIPLE}, not {dim}"
            found.append(Problem("format", rule, name, "format=int8"))
        if self.element_format.is_packed and not self.is_scaled:
            rule = f"{one_of(STORED_SCALES)} for {name}, whose few levels need scales that follow the numbers"
            found.append(Problem("granularity", rule, self.granularity, "granularity=token_head"))
        if (self.element_format.asymmetric or self.is_centred) and self.scale_dtype is DType.float8_e8m0fnu:
            what = "means" if self.is_centred else f"{name}, which stores zeros"
            rule = f"must have a sign for {what} beside its scales"
            found.append(Problem("scale_dtype", rule, self.scale_dtype.name, "scale_dtype=float16"))
        if self.is_centred or self.sink_tokens:
            found += self._centring_problems(tokens)
        elif self.shares_scales and (tokens is None or tokens % (self.block_size or tokens)):
            rule = f"must divide the tokens that are stored together, which are {tokens or 1}"
            found.append(Problem("block_size", rule, self.block_size, None if tokens is None else "block_size=null"))
        if self.granularity == "block" and self.is_scaled and dim % (self.block_size or 1):
            rule = f"must divide head_dim {dim}"
            found.append(Problem("block_size", rule, self.block_size, f"block_size={gcd(dim, self.block_size or 1)}"))
        return found

    def _centring_problems(self, tokens: int | None) -> list[Problem]:
        found = []
        if not self.is_scaled or self.shares_scales:
            rule = "token_head or block where means are taken from a page or sinks kept apart"
            found.append(Problem("granularity", rule, self.granularity, "granularity=token_head"))
        if tokens is None:
            rule = "must be none or hadamard, without sinks, where tokens are stored one by one"
            found.append(Problem("transform", rule, self.transform, "transform=hadamard"))
        elif self.sink_tokens >= tokens:
            rule = f"must be less than the {tokens} tokens of a page"
            found.append(Problem("sink_tokens", rule, self.sink_tokens, "sink_tokens=0"))
        return found

    def __str__(self) -> str:
        return self.granularity if self.block_size is None else f"{self.granularity} of {self.block_size}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the pages of one layer group are stored; nothing is left to guess.

    Attributes:
        key_format, value_format: element formats of keys and of values.
        granularity: which numbers share a scale (the table at the top of this file).
        scale_source: `unit` scales are 1 and `static` ones calibrated, and neither takes bytes; `dynamic` ones are
            computed as numbers arrive.
        scale_dtype: what one stored scale is.
        block_size: numbers along head_dim (`block`, which needs it) or tokens (`channel`; None = the whole page)
            that share a scale.
        key_granularity, key_block_size: the same for keys where they differ from values; None = they do not.
        transform: what is done to the numbers before they are stored (the table at the top of this file).
        open_page_format: element format of a page that is being filled; None = int8 where it cannot have the
            recipe's own (`closes`), else that.
        sink_tokens: first tokens of every page whose keys and values are kept in int8.
    """

    key_format: Format
    value_format: Format
    granularity: Granularity
    scale_source: ScaleSource
    scale_dtype: DType
    block_size: int | None = None
    key_granularity: Granularity | None = None
    key_block_size: int | None = None
    transform: Transform = "none"
    open_page_format: Format | None = None
    sink_tokens: int = 0

    @property
    def keys(self) -> SideRecipe:
        """How keys are stored."""
        own = self.key_granularity is not None
        block_size = self.key_block_size if own else self.block_size
        granularity = self.key_granularity or self.granularity
        return SideRecipe(self.key_format, granularity, block_size, self.scale_dtype, self.transform, self.sink_tokens)

    @property
    def values(self) -> SideRecipe:
        """How values are stored."""
        transform: Transform = "none" if self.transform == "none" else "hadamard"
        return SideRecipe(
            self.value_format, self.granularity, self.block_size, self.scale_dtype, transform, self.sink_tokens
        )

    @property
    def format_name(self) -> str:
        """Name of the element format; keys/values where they differ."""
        return "/".join(dict.fromkeys((self.key_format.name, self.value_format.name)))

    @property
    def is_scaled(self) -> bool:
        """Whether pages hold scales beside the elements."""
        return self.keys.is_scaled or self.values.is_scaled

    @property
    def closes(self) -> bool:
        """Whether a page is stored like this only once it is full.

        Tokens that share something cannot be stored one by one, and the newest tokens lose too much below 8 bits.
        """
        if self.open_page_format is not None:
            return True
        return any(side.element_format.is_packed or side.spans_tokens for side in (self.keys, self.values))

    @property
    def open_page(self) -> Recipe | None:
        """How a page is stored until it closes; None where it is stored like any other."""
        if not self.closes:
            return None
        element = self.open_page_format or FORMATS["int8"]
        if not element.scaled:
            return Recipe(element, element, "none", "unit", DType.float32)
        transform: Transform = "none" if self.transform == "none" else "hadamard"
        return Recipe(element, element, "token_head", "dynamic", DType.float16, transform=transform)

    def value_bytes(self, page_size: int, n_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of the elements of one layer's page."""
        return self.keys.element_bytes(page_size, n_heads, k_dim) + self.values.element_bytes(page_size, n_heads, v_dim)

    def scale_bytes(self, page_size: int, n_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of the scales, zeros, means and sinks of one layer's page."""
        return self.keys.scale_bytes(page_size, n_heads, k_dim) + self.values.scale_bytes(page_size, n_heads, v_dim)

    def page_bytes(self, page_size: int, n_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of one layer's page, elements and scales: the byte formula of kvcfg."""
        shape = (page_size, n_heads, k_dim, v_dim)
        return self.value_bytes(*shape) + self.scale_bytes(*shape)

    def __str__(self) -> str:
        words = [self.format_name]
        if self.granularity != "none" or self.key_granularity is not None:
            per = str(self.values) if self.key_granularity is None else f"{self.keys} (keys) and {self.values} (values)"
            kept = f" in {self.scale_dtype.name}" if self.is_scaled else ""
            words.append(f"{self.scale_source} scales per {per}{kept}")
        if self.transform != "none":
            words.append(self.transform)
        if self.sink_tokens:
            words.append(f"{self.sink_tokens} sink{'s' * (self.sink_tokens > 1)}")
        if self.open_page_format is not None:
            words.append(f"open pages in {self.open_page_format.name}")
        return ", ".join(words)


def _floats() -> tuple[Format, ...]:
    """Formats that hold numbers as they are, and 8-bit floats."""
    return (
        Format("float32", DType.float32, 32, 3.4028234663852886e38, False, "kvcfg.formats.cast:Cast"),
        Format("float16", DType.float16, 16, 65504.0, False, "kvcfg.formats.cast:Cast"),
        Format("bfloat16", DType.bfloat16, 16, 3.3895313892515355e38, False, "kvcfg.formats.cast:Cast"),
        Format("float8_e4m3fn", DType.float8_e4m3fn, 8, 448.0, True, "kvcfg.formats.fp8:E4M3"),
        Format("float8_e5m2", DType.float8_e5m2, 8, 57344.0, True, "kvcfg.formats.fp8:E5M2"),
    )


def _packed() -> tuple[Format, ...]:
    """Formats of 6 to 2 bits, several elements to a byte."""
    gaussian = {6: 3.744101, 5: 3.260732, 4: 2.73259, 3: 2.151946, 2: 1.510418}
    return (
        Format("float4_e2m1fn", DType.uint8, 4, 6.0, True, "kvcfg.formats.fp4:FP4"),
        *(
            Format(f"int{bits}", DType.uint8, bits, 2.0 ** (bits - 1) - 1, True, "kvcfg.formats.uniform:Symmetric")
            for bits in (6, 5, 4, 3, 2)
        ),
        *(
            Format(f"uint{bits}", DType.uint8, bits, 2.0**bits - 1, True, "kvcfg.formats.uniform:Asymmetric", True)
            for bits in (6, 5, 4, 3, 2)
        ),
        *(
            Format(f"gauss{bits}", DType.uint8, bits, largest, True, "kvcfg.formats.gaussian:Gaussian")
            for bits, largest in gaussian.items()
        ),
    )


FORMATS: dict[str, Format] = {
    item.name: item
    for item in (*_floats(), Format("int8", DType.int8, 8, 127.0, True, "kvcfg.formats.int8:Int8"), *_packed())
}


SINK = SideRecipe(FORMATS["int8"], "token_head", None, DType.float16, "hadamard")
"""How the first tokens of a page are kept where a recipe has sinks."""


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
