"""The `quantization` group: the recipe by which pages of `cache.kv_cache_format` are stored."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from kvcfg.config.base import Config, refuse
from kvcfg.config.model import LayerKind
from kvcfg.errors import Problem
from kvcfg.formats import Granularity, ScaleDType, ScaleSource, Transform


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


FormatName = Annotated[str, BeforeValidator(_lower)]


class LayerFormat(Config):
    """Layers that are stored in formats of their own; give `layers` or `kind`, and at least one format."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Layers of the model, counted from 0. null = all that are of `kind`."""

    kind: LayerKind | None = None
    """Layers that keep the same: full, sliding_window, chunked or mla. null = whatever they keep."""

    format: FormatName | None = None
    """Element format of keys and values. null = as key_format and value_format say."""

    key_format: FormatName | None = None
    """Element format of keys. null = format, else that of the other layers."""

    value_format: FormatName | None = None
    """Element format of values. null = format, else that of the other layers."""

    @model_validator(mode="after")
    def _says_which_and_what(self) -> LayerFormat:
        problems = []
        if not self.layers and self.kind is None:
            problems.append(Problem("layers", "must name layers, unless kind does", self.layers, "layers=[0]"))
        if self.format is None and self.key_format is None and self.value_format is None:
            problems.append(Problem("format", "must be given, or key_format or value_format", None, "format=bfloat16"))
        if problems:
            refuse(*problems)
        return self


class QuantizationConfig(Config):
    """How numbers become stored elements. All null means the defaults of the format."""

    granularity: Granularity | None = None
    """Which numbers share a scale: none, tensor, head, token_head, block, or channel (one scale for a channel of all
    tokens of a page). null = token_head for formats of 8 bits and less, none for the others."""

    quantization_granularity: int | None = Field(None, gt=0)
    """Numbers along head_dim that share one scale; needs granularity=block and must divide head_dim."""

    key_granularity: Granularity | None = None
    """Which numbers of keys share a scale, where it is not as for values. null = granularity."""

    key_quantization_granularity: int | None = Field(None, gt=0)
    """Numbers of keys that share one scale: along head_dim with key_granularity=block, tokens with channel. null =
    all tokens of a page."""

    scale_dtype: ScaleDType | None = None
    """What one stored scale is: float32, bfloat16, float16, float8_e4m3fn or float8_e8m0fnu (powers of two).
    null = float16 for pages that are stored as a whole, below 8 bits for example, else float32."""

    scale_source: ScaleSource | None = None
    """Where scales come from: dynamic (from the numbers, as they are written), unit (always 1, no bytes) or static
    (calibrated, no bytes). null = dynamic per token_head, block and channel, unit per tensor and head."""

    key_format: FormatName | None = None
    """Element format of keys. null = cache.kv_cache_format."""

    value_format: FormatName | None = None
    """Element format of values. null = cache.kv_cache_format."""

    transform: Transform | None = None
    """What is done to keys and values before they are quantized: none, hadamard (outliers are spread over a head),
    centred (keys also less the mean of their page) or balanced (as centred, with matrices from kvcfg calibrate).
    null = centred below 8 bits with scales per token_head or block, else none."""

    sink_tokens: int | None = Field(None, ge=0)
    """First tokens of every page whose keys and values are kept in int8; needs transform=centred or balanced. null =
    1 there, else 0."""

    open_page_format: FormatName | None = None
    """Element format of a page while it is filled; it gets its own when it is full. null = int8 where pages are
    stored as a whole, else the page's own from the beginning."""

    calibration: str | None = None
    """File that kvcfg calibrate wrote, for transform=balanced and scale_source=static. null = where it writes one
    for this model unless told otherwise."""

    layers: tuple[LayerFormat, ...] | None = None
    """Layers with formats of their own, for example [{layers:[0,1],format:bfloat16}]; of several that name a layer
    the last one counts. null = all layers alike."""

    balance_rope: bool | None = None
    """true = make the keys of a loaded model as large as the queries that read them, RoPE pair by RoPE pair, from
    the weights alone; the model computes the same. null = where several channels of a key share a scale."""

    experimental: bool = False
    """true = run a combination of the above that no recipe of conf/quantization stands for, so that nobody has
    measured it; its rows say so."""
