"""What values `KVCacheParams` takes, and which of them go together; every problem is found, none is mended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import Problem, one_of
from kvcfg.formats import SCALE_DTYPES, Recipe, ScaleSource

if TYPE_CHECKING:
    from kvcfg.group_params import KVCacheParams, KVCacheQuantizationConfig

LayerKind = Literal["full", "sliding_window", "chunked", "mla", "linear", "shared"]
SpeculativeMethod = Literal["standalone", "eagle", "mtp", "dflash"]
CacheRole = Literal["target", "draft"]

GROWING: tuple[LayerKind, ...] = ("full", "mla")
WINDOWED: tuple[LayerKind, ...] = ("sliding_window", "chunked")
PAGED: tuple[LayerKind, ...] = GROWING + WINDOWED


def params_problems(params: KVCacheParams) -> list[Problem]:
    """Everything wrong with the parameters; how values go together is asked once each can be on its own."""
    return _value_problems(params) or [*_shard_problems(params), *_storage_problems(params)]


def quantization_problems(config: KVCacheQuantizationConfig) -> list[Problem]:
    """Everything wrong with the scales on their own."""
    problems = _number_problems("quantization_granularity", config.quantization_granularity)
    if not isinstance(config.scale_dtype, DType):
        problems.append(Problem("scale_dtype", "must be a DType, like DType.float32", config.scale_dtype))
    if config.scale_source not in get_args(ScaleSource):
        problems.append(Problem("scale_source", one_of(get_args(ScaleSource)), config.scale_source))
    return problems


def takes_scales(dtype: DType) -> bool:
    """Whether numbers must be scaled before they are stored as this type."""
    return dtype is DType.int8 or dtype.is_float8()


def _number_problems(key: str, value: object, least: int = 1) -> list[Problem]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return []
    return [Problem(key, f"must be a whole number of at least {least}", value)]


def _value_problems(params: KVCacheParams) -> list[Problem]:
    """Values that cannot be on their own; the rest is only asked once there are none."""
    heads = 1 if params.kind in PAGED else 0
    problems = [
        *_number_problems("n_kv_heads", params.n_kv_heads, heads),
        *_number_problems("head_dim", params.head_dim, heads),
        *_number_problems("num_layers", params.num_layers),
        *_number_problems("page_size", params.page_size),
        *_number_problems("data_parallel_degree", params.data_parallel_degree),
        *_number_problems("num_draft_tokens", params.num_draft_tokens, 0),
        *_number_problems("state_bytes", params.state_bytes, 1 if params.kind == "linear" else 0),
    ]
    if params.num_q_heads is not None:
        problems += _number_problems("num_q_heads", params.num_q_heads)
    if params.value_head_dim is not None:
        problems += _number_problems("value_head_dim", params.value_head_dim)
    if params.kind in WINDOWED or params.window is not None:
        problems += _number_problems("window", params.window)
    if params.kind not in get_args(LayerKind):
        problems.append(Problem("kind", one_of(get_args(LayerKind)), params.kind))
    if not isinstance(params.dtype, DType):
        problems.append(Problem("dtype", "must be a DType, like DType.bfloat16", params.dtype))
    methods = get_args(SpeculativeMethod)
    if params.speculative_method is not None and params.speculative_method not in methods:
        problems.append(Problem("speculative_method", one_of(methods), params.speculative_method))
    if params.role not in get_args(CacheRole):
        problems.append(Problem("role", one_of(get_args(CacheRole)), params.role))
    return problems + _device_problems(params.devices)


def _device_problems(devices: Sequence[DeviceRef]) -> list[Problem]:
    given = [str(item) for item in devices]
    if not given:
        return [Problem("devices", "must name at least one device", given)]
    if not all(isinstance(item, DeviceRef) for item in devices):
        return [Problem("devices", "must be DeviceRefs, like DeviceRef.GPU(0)", given)]
    problems = []
    if len(set(devices)) < len(devices):
        problems.append(Problem("devices", "must not name a device twice", given))
    if len({item.device_type for item in devices}) > 1:
        problems.append(Problem("devices", "must be all CPUs or all GPUs", given))
    return problems


def _shard_problems(params: KVCacheParams) -> list[Problem]:
    """Heads and devices that do not divide."""
    problems = []
    dp, count = params.data_parallel_degree, params.n_devices
    if count % dp:
        problems.append(Problem("data_parallel_degree", f"must divide the {count} devices into equal replicas", dp))
        return problems
    tp, heads, queries = params.tensor_parallel_degree, params.n_kv_heads, params.num_q_heads
    if params.is_mla and queries is None:
        problems.append(Problem("num_q_heads", "must be set for MLA", None))
    if queries is not None and queries % tp:
        problems.append(Problem("num_q_heads", f"must be a multiple of tensor parallel {tp}", queries))
    replicated = params.allow_kv_head_replication and heads and tp % heads == 0
    if params.stores_pages and not params.is_mla and heads % tp and not replicated:
        rule = f"must be a multiple of tensor parallel {tp}"
        if tp % heads == 0:
            rule += "; fewer heads than devices need allow_kv_head_replication"
            problems.append(Problem("n_kv_heads", rule, heads, "allow_kv_head_replication=true"))
        else:
            problems.append(Problem("n_kv_heads", rule, heads))
    if params.num_draft_tokens and params.speculative_method is None:
        rule = "needs a speculative_method that makes the drafts"
        problems.append(Problem("num_draft_tokens", rule, params.num_draft_tokens, "num_draft_tokens=0"))
    if params.role == "draft" and params.speculative_method is None:
        problems.append(Problem("role", "needs a speculative_method whose drafter it is", "draft", "role=target"))
    if params.role == "draft" and params.kind not in GROWING:
        rule = "must be full or mla for a drafter, which shares the pages of layers that keep every token"
        problems.append(Problem("kind", rule, params.kind, "kind=full"))
    return problems


def _storage_problems(params: KVCacheParams) -> list[Problem]:
    """Elements and scales that do not go together."""
    config, dtype = params.kvcache_quant_config, params.dtype
    if not params.stores_pages:
        return []
    if params.recipe is None:
        if config is None and dtype.is_float8():
            rule = f"must be set for {dtype.name}: without scales most numbers are cut off or rounded away"
            fix = 'kvcache_quant_config=KVCacheQuantizationConfig(scale_source="unit") for scales of 1'
            return [Problem("kvcache_quant_config", rule, None, fix)]
        if config is not None and dtype.is_integral() and dtype is not DType.int8:
            return [
                Problem("dtype", "holds no quantized numbers: use int8 or fp8 with kvcache_quant_config", dtype.name)
            ]
        if config is not None and takes_scales(dtype) and config.scale_dtype.name not in SCALE_DTYPES:
            name = config.scale_dtype.name
            return [Problem("kvcache_quant_config.scale_dtype", one_of(SCALE_DTYPES), name)]
    recipe = params.storage
    block = recipe.block_size if recipe.granularity == "block" and recipe.is_scaled else None
    if block is not None and any(dim % block for dim in (params.head_dim, params.value_dim)):
        rule = f"must divide head_dim {params.head_dim}"
        if params.value_dim not in (0, params.head_dim):
            rule += f" and value_head_dim {params.value_dim}"
        fix = f"quantization_granularity={math.gcd(params.head_dim, params.value_dim)}"
        return [Problem("quantization_granularity", rule, block, fix)]
    return [] if params.recipe is None else _recipe_problems(params, params.recipe)


def _recipe_problems(params: KVCacheParams, recipe: Recipe) -> list[Problem]:
    """What a recipe asks for that these heads and pages cannot have."""
    sides = ((recipe.keys, params.head_dim), (recipe.values, params.value_dim))
    found = [item for side, dim in sides for item in side.problems(dim, params.page_size)]
    if params.is_mla and recipe.transform != "none":
        rule = "must be none for a latent, whose RoPE part must not be mixed with the rest"
        found.append(Problem("transform", rule, recipe.transform, "transform=none"))
    return [item.under("recipe") for item in dict.fromkeys(found)]
