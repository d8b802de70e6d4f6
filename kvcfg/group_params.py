"""The cache of one layer group: its parameters, checked, with every byte known.

    bytes_per_layer_page   one page of one layer on one device: the recipe's page_bytes, the only byte formula
    bytes_per_block        that times layers and tensor-parallel shards: one page of a replica, as in the reference
    bytes_per_token        bytes_per_block / page_size, for groups that grow with context; 0 for the others
    pages_per_sequence     pages a sequence may hold at any moment, room for draft tokens included

A window of W tokens with S slots of draft slack spans W + S slots. Starting anywhere in a page they touch
ceil((P - 1 + W + S) / P) pages of P slots; chunks start at multiples of W, so P - 1 becomes P - gcd(W, P).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError, Problem
from kvcfg.formats import FORMATS, Format, Recipe, ScaleSource
from kvcfg.param_checks import (
    GROWING,
    PAGED,
    CacheRole,
    LayerKind,
    SpeculativeMethod,
    params_problems,
    quantization_problems,
    takes_scales,
)
from kvcfg.units import ceil_div

if TYPE_CHECKING:
    from kvcfg.config.cache import KVConnectorConfig, KVConnectorType

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class KVCacheQuantizationConfig:
    """Scales of a quantized cache, in the reference's words.

    Attributes:
        scale_dtype: what one stored scale is.
        quantization_granularity: elements along head_dim that share one scale; must divide head_dim.
        scale_source: `dynamic` scales are stored beside the elements; `unit` ones are 1 and take no bytes.
    """

    scale_dtype: DType = DType.float32
    quantization_granularity: int = 128
    scale_source: ScaleSource = "dynamic"

    def __post_init__(self) -> None:
        if problems := quantization_problems(self):
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheParams:
    """The cache of one layer group on all its devices. Frozen; `replace` checks anew.

    Attributes:
        dtype: what one stored element is.
        n_kv_heads: KV heads of the model, over all devices.
        head_dim: width of a key; for MLA the latent with its RoPE part (rank + rope).
        num_layers: layers of the group.
        devices: all devices, replica after replica; equal numbers to each.
        enable_prefix_caching: whether full pages are kept for other requests.
        kv_connector, kv_connector_config: the tiers behind the pages.
        host_kvcache_swap_space_gb: host memory for pages per replica, in GiB.
        page_size: tokens per page.
        is_mla: one latent vector per token instead of keys and values; every device holds all of it.
        num_q_heads: query heads over all devices; MLA needs it.
        data_parallel_degree: replicas.
        kvcache_quant_config: scales; fp8 needs them, or the explicit choice of unit scales.
        speculative_method, num_draft_tokens: who drafts, and how many tokens a step.
        allow_kv_head_replication: with more shards than KV heads, keep copies of a head.
        kind: what a layer keeps: everything (full, mla), the last tokens (sliding_window, chunked), a state
            of fixed size (linear) or nothing (shared: it reads another layer's pages).
        window: tokens a query of a windowed layer can see, itself included.
        value_head_dim: width of a value where it is not head_dim. MLA stores none.
        state_bytes: bytes of a linear layer's state per sequence, over all heads.
        role: whose layers these are: the model's own (target), or those of the drafter beside it (draft).
        recipe: how pages are stored; None = what dtype and kvcache_quant_config say.

    Raises:
        ConfigError: with every problem, if values cannot be or do not go together.
    """

    dtype: DType
    n_kv_heads: int
    head_dim: int
    num_layers: int
    devices: Sequence[DeviceRef]
    enable_prefix_caching: bool = False
    kv_connector: KVConnectorType | None = None
    kv_connector_config: KVConnectorConfig | None = None
    host_kvcache_swap_space_gb: float | None = None
    page_size: int = 128
    is_mla: bool = False
    num_q_heads: int | None = None
    data_parallel_degree: int = 1
    kvcache_quant_config: KVCacheQuantizationConfig | None = None
    speculative_method: SpeculativeMethod | None = None
    num_draft_tokens: int = 0
    allow_kv_head_replication: bool = False
    kind: LayerKind = "full"
    window: int | None = None
    value_head_dim: int | None = None
    state_bytes: int = 0
    role: CacheRole = "target"
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        if self.is_mla and self.kind == "full":
            object.__setattr__(self, "kind", "mla")
        if self.kind == "mla":
            object.__setattr__(self, "is_mla", True)
        if problems := params_problems(self):
            raise ConfigError(problems)

    # Shards

    @property
    def n_devices(self) -> int:
        """Devices over all replicas."""
        return len(self.devices)

    @property
    def tensor_parallel_degree(self) -> int:
        """Devices of one replica."""
        return self.n_devices // self.data_parallel_degree

    @property
    def devices_per_replica(self) -> tuple[tuple[DeviceRef, ...], ...]:
        """The devices of each replica, in order."""
        return tuple(split_into_groups(self.devices, self.data_parallel_degree))

    @property
    def n_kv_heads_per_device(self) -> int:
        """KV heads that one device stores: 1 for MLA, and 1 where heads are replicated."""
        return 1 if self.is_mla else max(1, self.n_kv_heads // self.tensor_parallel_degree)

    @property
    def num_q_heads_per_device(self) -> int | None:
        """Query heads of one device."""
        return None if self.num_q_heads is None else self.num_q_heads // self.tensor_parallel_degree

    @property
    def replicates_kv_across_tp(self) -> bool:
        """Whether all devices of a replica hold the same bytes, as MLA's latent makes them."""
        return self.is_mla and self.tensor_parallel_degree > 1

    def copy_as_dp_1(self, replica: int = 0) -> KVCacheParams:
        """The parameters of one replica alone; its files go to a folder of their own."""
        settings = self.kv_connector_config
        if settings is not None and settings.disk_offload_dir is not None:
            folder = f"{settings.disk_offload_dir}/replica_{replica}"
            settings = settings.model_copy(update={"disk_offload_dir": folder})
        devices = self.devices_per_replica[replica]
        return replace(self, devices=devices, data_parallel_degree=1, kv_connector_config=settings)

    # Elements and scales

    @property
    def storage(self) -> Recipe:
        """How pages are stored: `recipe`, or what `dtype` and `kvcache_quant_config` say."""
        return self.recipe or _derived_recipe(self.dtype, self.kvcache_quant_config)

    @property
    def quantized_kv_cache(self) -> bool:
        """Whether pages hold scales beside their elements."""
        return self.stores_pages and self.storage.is_scaled

    @property
    def is_fp8_kv_dtype(self) -> bool:
        """Whether elements are 8-bit floats."""
        return self.dtype.is_float8()

    @property
    def dtype_shorthand(self) -> str:
        """The tag of the dtype in the reference's graph names; all but two types share `f32`."""
        return {DType.bfloat16: "bf16", DType.float8_e4m3fn: "f8_m4e3fn"}.get(self.dtype, "f32")

    @property
    def value_dim(self) -> int:
        """Width of a stored value; 0 for MLA."""
        return 0 if self.is_mla else self.value_head_dim or self.head_dim

    @property
    def shape_per_block(self) -> tuple[int, int, int, int, int]:
        """One device's share of a page: `[keys and values, num_layers, page_size, n_kv_heads_per_device, head_dim]`.

        Raises:
            ConfigError: if keys and values differ in width, so that no one shape holds both.
        """
        if self.value_dim not in (0, self.head_dim):
            rule = f"differs from head_dim={self.head_dim}: a page has no one shape, only bytes"
            raise ConfigError(Problem("value_head_dim", rule, self.value_head_dim))
        kv = 1 if self.is_mla else 2
        return (kv, self.num_layers, self.page_size, self.n_kv_heads_per_device, self.head_dim)

    @property
    def shape_per_scale_block(self) -> tuple[int, int, int, int, int]:
        """`shape_per_block` with head_dim replaced by the scales of one token in one head.

        Raises:
            ConfigError: if there are no scales to speak of.
        """
        scales = self.storage.keys.scales_per_token(self.head_dim)
        if not scales and self.kvcache_quant_config is not None:
            scales = ceil_div(self.head_dim, self.kvcache_quant_config.quantization_granularity)
        if not scales:
            raise ConfigError(Problem("kvcache_quant_config", "must be set to speak of scales", None))
        return (*self.shape_per_block[:-1], scales)

    # Bytes

    @property
    def grows(self) -> bool:
        """Whether a longer context takes more pages."""
        return self.kind in GROWING

    @property
    def stores_pages(self) -> bool:
        """Whether the group has pages of its own."""
        return self.kind in PAGED

    @property
    def bytes_per_layer_page(self) -> int:
        """Bytes of one page of one layer on one device, scales included."""
        if not self.stores_pages:
            return 0
        return self.storage.page_bytes(self.page_size, self.n_kv_heads_per_device, self.head_dim, self.value_dim)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one page over all layers and all shards of a replica."""
        return self.bytes_per_layer_page * self.num_layers * self.tensor_parallel_degree

    @property
    def closes_pages(self) -> bool:
        """Whether pages get their recipe only once they are full, and are kept in another one until then."""
        return self.grows and self.storage.closes

    @property
    def open_pages(self) -> KVCacheParams:
        """The same group as pages are stored until they close.

        Raises:
            ConfigError: if they are stored like any other.
        """
        recipe = self.storage.open_page
        if recipe is None:
            rule = "must be one whose pages close to speak of open ones"
            raise ConfigError(Problem("recipe", rule, str(self.storage)))
        scales = KVCacheQuantizationConfig(recipe.scale_dtype, self.head_dim) if recipe.is_scaled else None
        return replace(self, dtype=recipe.key_format.dtype, recipe=recipe, kvcache_quant_config=scales)

    @property
    def open_pages_per_sequence(self) -> int:
        """Pages that a sequence keeps open: the one being filled, and those that drafts may still take back."""
        if not self.closes_pages:
            return 0
        tokens = self.page_size - 1 + self.num_draft_tokens + self.spec_decode_cache_slack
        return max(1, ceil_div(tokens, self.page_size))

    @property
    def open_bytes_per_sequence(self) -> int:
        """Bytes of a sequence's open pages over all layers and shards."""
        return self.open_pages_per_sequence * self.open_pages.bytes_per_block if self.closes_pages else 0

    @property
    def bytes_per_token(self) -> float:
        """Bytes by which one more token of context grows the group, over all shards of a replica."""
        return per_token(self.bytes_per_block, self.page_size) if self.grows else 0

    def pages_per_sequence(self, max_seq_len: int) -> int:
        """Pages that one sequence of up to `max_seq_len` tokens may hold at any moment."""
        if not self.stores_pages:
            return 0
        pages = ceil_div(max_seq_len + self.spec_decode_cache_slack, self.page_size)
        if self.grows or self.window is None:
            return pages
        alignment = math.gcd(self.window, self.page_size) if self.kind == "chunked" else 1
        span = self.page_size - alignment + self.window + self.spec_decode_cache_slack
        return min(pages, ceil_div(span, self.page_size))

    def bytes_per_sequence(self, max_seq_len: int) -> int:
        """Bytes that one sequence of up to `max_seq_len` tokens may hold: its pages, or its state."""
        return self.pages_per_sequence(max_seq_len) * self.bytes_per_block + self.state_bytes * self.num_layers

    # Draft tokens

    @property
    def num_draft_tokens_per_step(self) -> int:
        """Draft tokens that one step of the drafter makes: all at once for dflash, else one; 0 without a drafter."""
        if self.speculative_method is None:
            return 0
        return self.num_draft_tokens if self.speculative_method == "dflash" else 1

    @property
    def spec_decode_cache_slack(self) -> int:
        """Slots beyond its length that a sequence needs while drafts are written, verified and rolled back."""
        drafts = self.num_draft_tokens
        return 0 if not drafts else 3 * drafts + (self.speculative_method == "dflash") + 1


def split_into_groups(items: Sequence[_T], num_groups: int) -> list[tuple[_T, ...]]:
    """Cut a sequence into that many runs of ceil(n / num_groups) items; the last ones may be short or empty.

    Raises:
        ConfigError: if there is no group to put them in.
    """
    if num_groups < 1:
        raise ConfigError(Problem("num_groups", "must be at least 1", num_groups))
    size = ceil_div(len(items), num_groups)
    return [tuple(items[start * size : (start + 1) * size]) for start in range(num_groups)]


def per_token(bytes_per_block: int, page_size: int) -> float:
    """Bytes of one token of a page; whole where they divide."""
    whole, rest = divmod(bytes_per_block, page_size)
    return whole if not rest else bytes_per_block / page_size


def _derived_recipe(dtype: DType, config: KVCacheQuantizationConfig | None) -> Recipe:
    """The recipe that the reference's pair of dtype and quantization config stands for."""
    bits, scaled = dtype.size_in_bits, takes_scales(dtype)
    element = FORMATS.get(dtype.name) or Format(dtype.name, dtype, bits, math.inf, scaled, "")
    if config is None or not takes_scales(dtype):
        return Recipe(element, element, "none", "unit", DType.float32)
    if config.scale_source == "unit":
        return Recipe(element, element, "tensor", "unit", config.scale_dtype)
    return Recipe(element, element, "block", "dynamic", config.scale_dtype, config.quantization_granularity)
