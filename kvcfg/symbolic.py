"""What a model's attention is given in a step: the name, type, shape and device of every input, before any exists.

Sizes that a batch decides are names: `replica_0_batch_size`. Every device of a replica gets the same page table
and lengths. Shapes are the reference's; a page's keys, values and scales may lie together in memory, so a
buffer can be a strided view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.group_params import KVCacheParams

_HOST = DeviceRef.CPU()


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One tensor.

    Attributes:
        dtype: the type of an element.
        shape: sizes, or names of those that a batch decides.
        device: where it lies.
        is_written: whether attention writes it, too.
    """

    dtype: DType
    shape: tuple[int | str, ...]
    device: DeviceRef
    is_written: bool = False


class DeviceInputs(NamedTuple):
    """What one device is given.

    Attributes:
        kv_blocks: the pages, the null page last.
        kv_scales: their scales; None without.
        lookup_table: which page holds a sequence's n-th tokens; the null page pads it.
        cache_lengths: tokens that each sequence has stored.
        max_lengths: widest query and longest sequence of every step: `sizing.max_lengths`.
        attention_dispatch_metadata: what a kernel is launched with: sequences, widest query, partitions and, with
            heads, the longest sequence.
        draft_attention_dispatch_metadata: the same for the drafter; None without.
        mla_num_partitions: into how many parts a kernel splits the tokens of a latent; None with heads.
        draft_mla_num_partitions: the same for the drafter; None with heads, or without one.
    """

    kv_blocks: InputSpec
    kv_scales: InputSpec | None
    lookup_table: InputSpec
    cache_lengths: InputSpec
    max_lengths: InputSpec
    attention_dispatch_metadata: InputSpec
    draft_attention_dispatch_metadata: InputSpec | None
    mla_num_partitions: InputSpec | None
    draft_mla_num_partitions: InputSpec | None


def symbolic_inputs(params: KVCacheParams) -> tuple[DeviceInputs, ...]:
    """The inputs of every device, replica after replica.

    Raises:
        ConfigError: if keys and values differ in width, so that no one shape holds both.
    """
    return tuple(
        _device_inputs(params, f"replica_{replica}", device)
        for replica, devices in enumerate(params.devices_per_replica)
        for device in devices
    )


def _device_inputs(params: KVCacheParams, replica: str, device: DeviceRef) -> DeviceInputs:
    pages, batch = "total_num_pages", f"{replica}_batch_size"
    scales = None
    if params.quantized_kv_cache:
        shape = (pages, *params.shape_per_scale_block)
        scales = InputSpec(params.storage.scale_dtype, shape, device, is_written=True)
    # Latents are read by a kernel that looks at its launch on the device; heads are dispatched from the host.
    dispatch = InputSpec(DType.int64, (3,), device) if params.is_mla else InputSpec(DType.int64, (4,), _HOST)
    partitions = InputSpec(DType.int64, (1,), _HOST) if params.is_mla else None
    return DeviceInputs(
        kv_blocks=InputSpec(params.dtype, (pages, *params.shape_per_block), device, is_written=True),
        kv_scales=scales,
        lookup_table=InputSpec(DType.uint32, (batch, f"{replica}_max_num_pages"), device),
        cache_lengths=InputSpec(DType.uint32, (batch,), device),
        max_lengths=InputSpec(DType.uint32, (f"{replica}_steps_remaining", 2), _HOST),
        attention_dispatch_metadata=dispatch,
        draft_attention_dispatch_metadata=dispatch if params.num_draft_tokens else None,
        mla_num_partitions=partitions,
        draft_mla_num_partitions=partitions if params.num_draft_tokens else None,
    )
