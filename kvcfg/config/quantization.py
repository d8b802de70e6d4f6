"""The `quantization` group: the recipe by which pages of `cache.kv_cache_format` are stored."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from kvcfg.config.base import Config
from kvcfg.formats import Granularity, ScaleDType, ScaleSource


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


FormatName = Annotated[str, BeforeValidator(_lower)]


class QuantizationConfig(Config):
    """How numbers become stored elements. All null means the defaults of the format."""

    granularity: Granularity | None = None
    """Which numbers share a scale: none, tensor, head, token_head, block, or channel (one scale for a channel of all
    tokens of a page). null = token_head for formats of 8 bits and less, none for the others."""

    quantization_granularity: int | None = Field(None, gt=0)
    """Numbers along head_dim that share one scale; needs granularity=block and must divide head_dim."""

    scale_dtype: ScaleDType | None = None
    """What one stored scale is: float32, bfloat16, float16, float8_e4m3fn or float8_e8m0fnu (powers of two).
    null = float32."""

    scale_source: ScaleSource | None = None
    """Where scales come from: dynamic (from the numbers, as they are written) or unit (always 1, no bytes).
    null = dynamic per token_head, block and channel, unit per tensor and head."""

    key_format: FormatName | None = None
    """Element format of keys. null = cache.kv_cache_format."""

    value_format: FormatName | None = None
    """Element format of values. null = cache.kv_cache_format."""

    balance_rope: bool | None = None
    """true = make the keys of a loaded model as large as the queries that read them, RoPE pair by RoPE pair, from
    the weights alone; the model computes the same. null = where several channels of a key share a scale."""
