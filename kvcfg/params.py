"""What will be built: the caches of all layer groups behind one allocation, and the bytes they take.

`MultiKVCacheParams.memory` is the one formula: the planner solves it for pages, allocation equals it to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError, Problem, show
from kvcfg.group_params import KVCacheParams, KVCacheQuantizationConfig, per_token
from kvcfg.param_checks import SpeculativeMethod
from kvcfg.units import ceil_div

if TYPE_CHECKING:
    from kvcfg.config.cache import KVConnectorType

__all__ = ["KVCacheParams", "KVCacheQuantizationConfig", "Memory", "MultiKVCacheParams", "table_columns"]

NUM_TABLE_BUFFERS = 2
"""Page tables and lengths are there twice: one for the running step, one for the next."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one replica's cache over all its shards, by what they hold.

    Attributes:
        pages: the pages of growing groups of the model.
        draft_pages: the same pages of the drafter's groups.
        null_pages: one page a group that pads page tables and is never read, and one for its open pages.
        open_pages: pages that are being filled, where they are stored in another format until they close.
        windowed: the pages of windowed groups, enough for every sequence.
        states: the states of linear layers.
        page_tables: which pages a sequence has, and its length; twice, so that the next batch can be prepared
            while a step still reads the last.
    """

    pages: int
    draft_pages: int
    null_pages: int
    open_pages: int
    windowed: int
    states: int
    page_tables: int

    @property
    def total(self) -> int:
        """All bytes together."""
        pages = self.pages + self.draft_pages + self.null_pages + self.open_pages + self.windowed
        return pages + self.states + self.page_tables


@dataclass(frozen=True, slots=True)
class MultiKVCacheParams:
    """The caches of all layer groups behind one allocation: same pages, devices, tiers and drafts.

    The groups of the model come first, then those of its drafter.

    Raises:
        ConfigError: if there is no group of the model, groups disagree or stand in another order.
    """

    params: tuple[KVCacheParams, ...]

    def __post_init__(self) -> None:
        if not self.params:
            raise ConfigError(Problem("params", "must hold at least one layer group"))
        problems = []
        roles = [item.role for item in self.params]
        if roles[0] == "draft" or roles != sorted(roles, reverse=True):
            problems.append(Problem("params", "must hold the groups of the model, then those of its drafter", roles))
        for name in _COMMON:
            values = list(dict.fromkeys(getattr(item, name) for item in self.params))
            if len(values) > 1:
                rule = f"must be the same for all layer groups, not {' and '.join(_written(v) for v in values)}"
                problems.append(Problem(name, rule))
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_params(cls, *params: KVCacheParams) -> MultiKVCacheParams:
        """The caches of these layer groups together."""
        return cls(params)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.params[0].page_size

    @property
    def devices(self) -> Sequence[DeviceRef]:
        """All devices, replica after replica."""
        return self.params[0].devices

    @property
    def n_devices(self) -> int:
        """Devices over all replicas."""
        return self.params[0].n_devices

    @property
    def data_parallel_degree(self) -> int:
        """Replicas."""
        return self.params[0].data_parallel_degree

    @property
    def tensor_parallel_degree(self) -> int:
        """Devices of one replica."""
        return self.params[0].tensor_parallel_degree

    @property
    def replicates_kv_across_tp(self) -> bool:
        """Whether the first group keeps the same bytes on every device of a replica."""
        return self.params[0].replicates_kv_across_tp

    @property
    def enable_prefix_caching(self) -> bool:
        """Whether full pages are kept for other requests."""
        return self.params[0].enable_prefix_caching

    @property
    def kv_connector(self) -> KVConnectorType | None:
        """The tiers behind the pages."""
        return self.params[0].kv_connector

    @property
    def host_kvcache_swap_space_gb(self) -> float | None:
        """Host memory for pages per replica, in GiB."""
        return self.params[0].host_kvcache_swap_space_gb

    @property
    def speculative_method(self) -> SpeculativeMethod | None:
        """Who drafts tokens."""
        return self.params[0].speculative_method

    @property
    def draft_groups(self) -> tuple[KVCacheParams, ...]:
        """The groups of the drafter."""
        return tuple(item for item in self.params if item.role == "draft")

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens of a step."""
        return self.params[0].num_draft_tokens

    @property
    def num_draft_tokens_per_step(self) -> int:
        """Draft tokens that one step of the drafter makes."""
        return self.params[0].num_draft_tokens_per_step

    @property
    def spec_decode_cache_slack(self) -> int:
        """Slots beyond its length that a sequence needs while drafting."""
        return self.params[0].spec_decode_cache_slack

    @property
    def grows(self) -> bool:
        """Whether a longer context takes more pages in any group."""
        return any(item.grows for item in self.params)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one page of every growing group, over all layers and shards of a replica."""
        return sum(item.bytes_per_block for item in self.params if item.grows)

    @property
    def bytes_per_token(self) -> float:
        """Bytes by which one more token of context grows the cache, over all shards of a replica."""
        return per_token(self.bytes_per_block, self.page_size)

    def bytes_per_sequence(self, max_seq_len: int) -> int:
        """Bytes that one sequence of up to `max_seq_len` tokens may hold in all groups."""
        return sum(item.bytes_per_sequence(max_seq_len) for item in self.params)

    def page_table_columns(self, max_seq_len: int) -> tuple[int, ...]:
        """Columns of each page table, in the order of the groups that come first in them.

        Growing groups have the same pages of a sequence and share a table; a windowed group has its own.
        """
        columns = []
        grown = False
        for item in self.params:
            if item.stores_pages and not (item.grows and grown):
                columns.append(table_columns(item.pages_per_sequence(max_seq_len)))
                grown = grown or item.grows
        return tuple(columns)

    def memory(self, num_pages: int, max_batch_size: int, max_seq_len: int) -> Memory:
        """Bytes of one replica; what is allocated equals them to the byte.

        Args:
            num_pages: pages that growing groups share among all sequences, the null page not counted.
            max_batch_size: sequences held at the same time.
            max_seq_len: tokens of the longest one.
        """
        paged = [item for item in self.params if item.stores_pages]
        windowed = [item for item in paged if not item.grows]
        entries = sum(self.page_table_columns(max_seq_len)) + 1  # one more: the length
        draft_block = sum(item.bytes_per_block for item in self.draft_groups)
        return Memory(
            pages=num_pages * (self.bytes_per_block - draft_block),
            draft_pages=num_pages * draft_block,
            null_pages=sum(item.bytes_per_block for item in paged)
            + sum(item.open_pages.bytes_per_block for item in paged if item.closes_pages),
            open_pages=max_batch_size * sum(item.open_bytes_per_sequence for item in paged),
            windowed=max_batch_size * sum(item.bytes_per_sequence(max_seq_len) for item in windowed),
            states=max_batch_size * sum(item.state_bytes * item.num_layers for item in self.params),
            page_tables=NUM_TABLE_BUFFERS
            * self.tensor_parallel_degree
            * max_batch_size
            * entries
            * DType.int32.size_in_bytes,
        )


def table_columns(num_pages: int) -> int:
    """Columns of a page table for that many pages: kernels read 8 entries at a time, and up to 16 beyond the last."""
    return ceil_div(num_pages, 8) * 8 + 16


_COMMON = (
    "page_size",
    "data_parallel_degree",
    "devices",
    "enable_prefix_caching",
    "kv_connector",
    "kv_connector_config",
    "host_kvcache_swap_space_gb",
    "speculative_method",
    "num_draft_tokens",
)


def _written(value: Any) -> str:
    return show([str(item) for item in value] if isinstance(value, tuple) else value)
