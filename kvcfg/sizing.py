"""How many pages fit into memory, what they take, and how long a sequence they hold.

With M bytes over all devices, B bytes a page of a replica, and what windows and states take set aside:

    allocable = (M // dp - set aside) // B
    need      = max_batch_size * ceil((max_seq_len + draft slack) / page_size)
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcfg.errors import CapacityError, ConfigError, Problem
from kvcfg.params import KVCacheParams, MultiKVCacheParams
from kvcfg.units import GIB, ceil_div, readable_bytes

CacheParams = KVCacheParams | MultiKVCacheParams

_ANY_LENGTH = 1 << 62  # windows and states are bounded whatever the length


def compute_num_device_blocks(
    params: CacheParams,
    available_cache_memory: int,
    max_batch_size: int | None,
    max_seq_len: int | None,
    *,
    include_null_block: bool = False,
    require_max_seq_len_fits: bool = False,
) -> int:
    """Pages per replica: as many as fit, but no more than the workload can use.

    Args:
        params: what is cached.
        available_cache_memory: bytes over all devices.
        max_batch_size: sequences held at the same time; None = unknown, then pages are bounded by memory alone.
        max_seq_len: tokens of the longest sequence; None as above.
        include_null_block: make room for the page that pads page tables. Bounded by the workload, the count
            includes it; bounded by memory alone, it is taken off.
        require_max_seq_len_fits: refuse pages that cannot hold one sequence of `max_seq_len`.

    Raises:
        CapacityError: if not even one page fits, or not one sequence where that is required.
        ConfigError: if a size is negative or zero.
    """
    _check_workload(max_batch_size, max_seq_len)
    allocable = _allocable_blocks(params, available_cache_memory, max_batch_size, max_seq_len, include_null_block)
    null = int(include_null_block)
    if max_batch_size is None or max_seq_len is None:
        return allocable - null
    pages_per_request = ceil_div(max_seq_len + params.spec_decode_cache_slack, params.page_size)
    if require_max_seq_len_fits and pages_per_request > allocable - null:
        raise CapacityError(
            f"one sequence of {max_seq_len} tokens needs {pages_per_request + null} pages "
            f"({readable_bytes((pages_per_request + null) * params.bytes_per_block)}), {allocable} fit"
        )
    return min(allocable, pages_per_request * max_batch_size + null)


def estimated_memory_size(
    params: CacheParams, available_cache_memory: int, max_batch_size: int | None, max_seq_len: int | None
) -> int:
    """Bytes that the pages of `compute_num_device_blocks` take over all replicas."""
    blocks = compute_num_device_blocks(params, available_cache_memory, max_batch_size, max_seq_len)
    return blocks * params.bytes_per_block * params.data_parallel_degree


def compute_max_seq_len_fitting_in_cache(
    params: CacheParams, available_cache_memory: int, *, include_null_block: bool = False
) -> int:
    """Tokens of the longest sequence that fits into one replica when it is alone there.

    Raises:
        CapacityError: if not even one page fits.
        ConfigError: if the memory is negative.
    """
    allocable = _allocable_blocks(params, available_cache_memory, None, None, include_null_block)
    pages = allocable - int(include_null_block)
    return max(1, pages * params.page_size - params.spec_decode_cache_slack)


def compute_num_host_blocks(params: CacheParams) -> int:
    """Pages per replica that its host memory holds; 0 without a host tier. Copies of a latent count once.

    Raises:
        CapacityError: if the host memory does not hold one page.
    """
    gib = params.host_kvcache_swap_space_gb
    if gib is None or params.kv_connector is None or not params.kv_connector.has_host_tier:
        return 0
    page = sum(
        item.bytes_per_block // (item.tensor_parallel_degree if item.replicates_kv_across_tp else 1)
        for item in _members(params)
        if item.grows
    )
    blocks = int(gib * GIB) // page
    if blocks < 1:
        raise CapacityError(f"one page takes {readable_bytes(page)}, the host memory holds {readable_bytes(gib * GIB)}")
    return blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSlots:
    """What one step of a request reads and writes, in tokens.

    Attributes:
        processed: tokens whose keys and values are stored.
        active: tokens that this step processes.
        num_draft_tokens: drafts that this step makes.
        is_block_draft: whether they are made all at once, which needs a slot for the block's own token.
        to_verify: drafts of the step before that this step checks.
        maybe_accepted: drafts of a step still under way that may turn out accepted.
        num_steps: tokens to be made before the next allocation.
    """

    processed: int
    active: int
    num_draft_tokens: int = 0
    is_block_draft: bool = False
    to_verify: int = 0
    maybe_accepted: int = 0
    num_steps: int = 1

    @property
    def slots(self) -> int:
        """Slots that must be there: the newest token of a step has none yet, drafts take theirs twice over."""
        extra = int(self.is_block_draft and self.num_draft_tokens > 0)
        drafts = self.maybe_accepted + 2 * self.num_draft_tokens + extra
        return self.processed + self.active + drafts + self.num_steps - 1

    @property
    def query_width(self) -> int:
        """Tokens that attend in this step."""
        return self.active + self.to_verify

    @property
    def valid_length(self) -> int:
        """Slots that hold something to attend to once this step has written its own."""
        return self.processed + self.maybe_accepted + self.query_width + self.num_draft_tokens


def max_lengths(max_seq_length: int, max_cache_length: int, num_steps: int = 1) -> list[list[int]]:
    """The widest query and the longest sequence of each step of a batch, `[num_steps, 2]`.

    Args:
        max_seq_length: most tokens that a sequence computes in the first step; later steps compute one.
        max_cache_length: tokens of the longest sequence once the first step has stored its own.
        num_steps: steps until the next batch is made.
    """
    first = [[max_seq_length, max_cache_length]]
    return (first + [[1, max_cache_length + step] for step in range(1, num_steps)])[:num_steps]


def _check_workload(max_batch_size: int | None, max_seq_len: int | None) -> None:
    given = (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len))
    problems = [Problem(key, "must be at least 1", value) for key, value in given if value is not None and value < 1]
    if problems:
        raise ConfigError(problems)


def _allocable_blocks(
    params: CacheParams,
    available_cache_memory: int,
    max_batch_size: int | None,
    max_seq_len: int | None,
    include_null_block: bool,
) -> int:
    if not isinstance(available_cache_memory, int) or available_cache_memory < 0:
        rule = "must be a whole number of bytes, 0 or more"
        raise ConfigError(Problem("available_cache_memory", rule, available_cache_memory))
    if not params.grows:
        raise ConfigError(Problem("params", "must hold layers that grow with context to be counted in pages"))
    set_aside = (max_batch_size or 1) * sum(
        item.open_bytes_per_sequence if item.grows else item.bytes_per_sequence(max_seq_len or _ANY_LENGTH)
        for item in _members(params)
    )
    per_replica = available_cache_memory // params.data_parallel_degree
    blocks = max(0, per_replica - set_aside) // params.bytes_per_block
    least = 1 + int(include_null_block)
    if blocks < least:
        pages = "one page takes" if least == 1 else "the null page and one page of a sequence take"
        beside = f" beside {readable_bytes(set_aside)} for windows and states" if set_aside else ""
        raise CapacityError(
            f"{pages} {readable_bytes(least * params.bytes_per_block)}{beside}, "
            f"a replica has {readable_bytes(per_replica)}"
        )
    return blocks


def _members(params: CacheParams) -> tuple[KVCacheParams, ...]:
    return params.params if isinstance(params, MultiKVCacheParams) else (params,)
