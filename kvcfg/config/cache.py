"""The `cache` group: pages, their format, the memory they may take and the tiers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from kvcfg.config.base import ByteCount, refuse
from kvcfg.config.config_file import ConfigFile
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError, Problem, one_of
from kvcfg.formats import FORMATS, find_format
from kvcfg.group_params import KVCacheParams, KVCacheQuantizationConfig
from kvcfg.param_checks import SpeculativeMethod

HashAlgo = Literal["sha256", "xxh3_128", "blake3"]
Eviction = Literal["lru", "lfu", "fifo", "priority"]

_BY_ENCODING: dict[str | None, DType] = {
    None: DType.float32,
    "float32": DType.float32,
    "float16": DType.float16,
    "bfloat16": DType.bfloat16,
    "float8_e4m3fn": DType.bfloat16,
    "float6_e2m3fn": DType.bfloat16,
    "float4_e2m1fnx2": DType.bfloat16,
    "gptq": DType.bfloat16,
    "q4_k": DType.float32,
    "q4_0": DType.float32,
    "q6_k": DType.float32,
}


class KVConnectorType(StrEnum):
    """Where pages go that leave the device."""

    null = "null"
    local = "local"
    tiered = "tiered"
    dkv = "dkv"

    @property
    def has_host_tier(self) -> bool:
        """Whether pages are kept in host memory."""
        return self in (KVConnectorType.local, KVConnectorType.tiered)

    def __str__(self) -> str:
        return self.value


class KVConnectorConfig(ConfigFile):
    """Settings of the tiers behind the device. Sizes are never assumed: a tier that is used needs its size."""

    host_kvcache_swap_space_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Host memory for pages, in GiB per replica; local and tiered need it. null = not set."""

    disk_offload_dir: str | None = None
    """Folder for pages on disk; tiered needs it. Each replica uses a folder of its own inside."""

    disk_offload_max_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Disk space for pages, in GiB per replica; tiered needs it. null = not set."""

    disk_offload_direct_io: bool = False
    """Read and write pages past the page cache of the operating system (O_DIRECT)."""

    block_store_endpoint: str | None = None
    """Address of the shared block store, like tcp://host:7000 or ipc:///run/kv.sock; dkv needs it."""


_NEEDS: dict[KVConnectorType, dict[str, str]] = {
    KVConnectorType.local: {"host_kvcache_swap_space_gb": "8"},
    KVConnectorType.tiered: {
        "host_kvcache_swap_space_gb": "8",
        "disk_offload_dir": "/tmp/kv",
        "disk_offload_max_gb": "50",
    },
    KVConnectorType.dkv: {"block_store_endpoint": "tcp://127.0.0.1:7000"},
}
"""What each connector cannot do without, with a value to try."""


class KVCacheConfig(ConfigFile):
    """How the KV cache is laid out, how much memory it may take, and where its pages go."""

    kv_cache_page_size: int = Field(128, ge=1, le=4096)
    """Tokens per page, 1 to 4096. Small pages waste less, large ones read faster."""

    enable_prefix_caching: bool = True
    """Keep full pages for other requests that start with the same tokens."""

    kv_connector: KVConnectorType | None = None
    """Where pages go that leave the device: null (nowhere), local (host memory), tiered (host memory, then
    disk) or dkv (a shared block store)."""

    kv_connector_config: KVConnectorConfig | None = None
    """Settings of the connector."""

    device_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the free device memory that weights, activations and cache may take together."""

    kv_cache_format: str | None = None
    """Element format of stored keys and values: float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8,
    int6 to int2, uint6 to uint2, gauss6 to gauss2 or float4_e2m1fn. null = the recipe's, else the model's dtype."""

    kv_cache_memory_bytes: ByteCount | None = Field(None, gt=0)
    """Memory for the cache per device, in bytes or with a unit (8GiB); wins over device_memory_utilization.
    null = what that share leaves."""

    kv_cache_hash_algo: HashAlgo = "sha256"
    """Hash that names a page by its tokens: sha256, xxh3_128 (fast, for trusted input) or blake3."""

    kv_cache_hash_seed: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$")
    """64 hex digits mixed into every hash, so that caches with different seeds share no pages. null = none."""

    eviction: Eviction = "lru"
    """Which cached page goes first when pages run short: the least recently used (lru), the least often hit (lfu),
    the longest cached (fifo), or that of the sequence with the lowest priority (priority)."""

    verify_prefix_tokens: bool = False
    """Keep the token ids of every cached page and compare them before a hit is believed."""

    reuse_partial_pages: bool = False
    """Where a prompt leaves a cached page in its middle, copy the part before that instead of computing it."""

    enable_dp_cross_replica_prefix_copy: bool = True
    """Let a replica copy the pages of a prefix that another replica has, instead of computing them."""

    @field_validator("kv_cache_format")
    @classmethod
    def _format_is_known(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                find_format(name, key="kv_cache_format")
            except ConfigError as error:
                refuse(*error.problems)
        return name

    @field_validator("kv_cache_hash_algo", mode="before")
    @classmethod
    def _hash_is_wide(cls, name: object) -> object:
        if name == "ahash64":
            rule = "ahash64 has 64 bits, too few to tell all pages apart; must be sha256, xxh3_128 or blake3"
            refuse(Problem("kv_cache_hash_algo", rule, name, "kv_cache_hash_algo=xxh3_128"))
        return name

    @model_validator(mode="after")
    def _connector_has_what_it_needs(self) -> KVCacheConfig:
        if problems := self._connector_problems():
            refuse(*problems)
        return self

    def _connector_problems(self) -> list[Problem]:
        connector = self.kv_connector
        if connector is None or connector is KVConnectorType.null:
            return []
        settings = self.kv_connector_config or KVConnectorConfig()
        problems = [
            Problem(
                f"kv_connector_config.{name}",
                f"must be set for kv_connector={connector}",
                getattr(settings, name),
                f"kv_connector_config.{name}={example}",
            )
            for name, example in _NEEDS[connector].items()
            if getattr(settings, name) in (None, "")
        ]
        if connector.has_host_tier and not self.enable_prefix_caching:
            rule = f"must be true for kv_connector={connector}: pages are found again by their prefix"
            problems.append(Problem("enable_prefix_caching", rule, False, "enable_prefix_caching=true"))
        return problems

    @property
    def cache_dtype(self) -> DType:
        """The type of a stored element; float32 where nothing says otherwise, as in the reference."""
        return self.cache_dtype_for(None)

    def cache_dtype_for(self, quantization_encoding: str | None) -> DType:
        """The type of a stored element beside weights of that encoding; `kv_cache_format` wins.

        Raises:
            ConfigError: if the encoding is unknown.
        """
        if self.kv_cache_format is not None:
            return find_format(self.kv_cache_format).dtype
        if quantization_encoding not in _BY_ENCODING:
            known = [name for name in _BY_ENCODING if name is not None]
            raise ConfigError(Problem("quantization_encoding", one_of(known), quantization_encoding))
        return _BY_ENCODING[quantization_encoding]

    def to_params(
        self,
        dtype: DType,
        n_kv_heads: int,
        head_dim: int,
        num_layers: int,
        devices: Sequence[DeviceRef],
        data_parallel_degree: int = 1,
        is_mla: bool = False,
        num_q_heads: int | None = None,
        kvcache_quant_config: KVCacheQuantizationConfig | None = None,
        speculative_method: SpeculativeMethod | None = None,
        num_draft_tokens: int = 0,
    ) -> KVCacheParams:
        """The parameters of one cache with this config's pages, prefix caching and connector.

        Args:
            dtype: type of a stored element; must agree with `kv_cache_format` where that is set.
            n_kv_heads: KV heads over all devices.
            head_dim: width of a key.
            num_layers: layers of the model.
            devices: all devices, replica after replica.
            data_parallel_degree: replicas.
            is_mla: whether a token is stored as one latent vector.
            num_q_heads: query heads over all devices; MLA needs it.
            kvcache_quant_config: scales beside the elements; fp8 needs it.
            speculative_method: who drafts tokens.
            num_draft_tokens: drafts of a step.

        Raises:
            ConfigError: with every problem, if values cannot be or do not go together.
        """
        if self.kv_cache_format is not None and FORMATS[self.kv_cache_format.lower()].dtype is not dtype:
            rule = f"differs from dtype={getattr(dtype, 'name', dtype)}; set one of them, or both to the same"
            raise ConfigError(Problem("kv_cache_format", rule, self.kv_cache_format, "kv_cache_format=null"))
        connector = self.kv_connector_config
        return KVCacheParams(
            dtype=dtype,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            num_layers=num_layers,
            devices=devices,
            enable_prefix_caching=self.enable_prefix_caching,
            kv_connector=self.kv_connector,
            kv_connector_config=connector,
            host_kvcache_swap_space_gb=None if connector is None else connector.host_kvcache_swap_space_gb,
            page_size=self.kv_cache_page_size,
            is_mla=is_mla,
            num_q_heads=num_q_heads,
            data_parallel_degree=data_parallel_degree,
            kvcache_quant_config=kvcache_quant_config,
            speculative_method=speculative_method,
            num_draft_tokens=num_draft_tokens,
        )
