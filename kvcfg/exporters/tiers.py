"""The tiers behind the device, as all engines see them: sizes of host memory and disk, and an address."""

from __future__ import annotations

from typing import NamedTuple

from kvcfg.config.cache import KVCacheConfig, KVConnectorConfig, KVConnectorType
from kvcfg.units import GIB


class Tiers(NamedTuple):
    """What is behind the device.

    Attributes:
        host_gib: host memory in GiB per replica; None where there is none.
        disk_gib: disk space in GiB per replica; None where there is none.
        disk_dir: folder on disk.
        direct_io: whether files bypass the page cache.
        endpoint: address of a shared block store.
    """

    host_gib: float | None
    disk_gib: float | None
    disk_dir: str | None
    direct_io: bool
    endpoint: str | None

    @property
    def host_bytes(self) -> int:
        """Host memory in bytes per replica."""
        size: int = round((self.host_gib or 0) * GIB)
        return size


def tiers_of(cache: KVCacheConfig) -> Tiers | None:
    """The tiers that a cache uses; settings of tiers that its connector leaves alone are not among them."""
    connector = cache.kv_connector
    if connector is None or connector is KVConnectorType.null:
        return None
    settings = cache.kv_connector_config or KVConnectorConfig()
    if connector is KVConnectorType.dkv:
        return Tiers(None, None, None, False, settings.block_store_endpoint)
    host = settings.host_kvcache_swap_space_gb
    if connector is KVConnectorType.local:
        return Tiers(host, None, None, False, None)
    return Tiers(host, settings.disk_offload_max_gb, settings.disk_offload_dir, settings.disk_offload_direct_io, None)


def whole(number: float) -> int | float:
    """A number without a decimal point where it has no fraction."""
    return int(number) if number == int(number) else number
