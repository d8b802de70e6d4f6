"""What kernels see of a model: layers of the same heads and recipe are one shape."""

from __future__ import annotations

from dataclasses import dataclass

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.params import KVCacheParams


@dataclass(frozen=True, slots=True)
class KernelShape:
    """One layer on one device.

    Attributes:
        params: the layer, as one that grows; a windowed layer reads the same pages, only fewer of them.
        n_q_heads: query heads.
        value_dim: numbers of a value as queries read it.
        window: tokens that a query sees; None = all.
        dtype: what the model computes in.
    """

    params: KVCacheParams
    n_q_heads: int
    value_dim: int
    window: int | None
    dtype: DType

    def __str__(self) -> str:
        heads = f"{self.n_q_heads}/{self.params.n_kv_heads}/{self.params.head_dim}"
        return heads if self.window is None else f"{heads} window {self.window}"

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return float(self.params.head_dim**-0.5)


def kernel_shapes(experiment: ExperimentConfig) -> list[KernelShape]:
    """The shapes of an experiment's own layers, each once; a drafter's are left out."""
    groups = [group for group in experiment.to_params().params if group.stores_pages and group.role == "target"]
    return list(dict.fromkeys(_shape(group, experiment) for group in groups))


def _shape(group: KVCacheParams, experiment: ExperimentConfig) -> KernelShape:
    n_q_heads = max(1, experiment.model.num_q_heads // group.tensor_parallel_degree)
    layer = KVCacheParams(
        dtype=group.dtype,
        n_kv_heads=group.n_kv_heads_per_device,
        head_dim=group.head_dim,
        num_layers=1,
        devices=(DeviceRef.CPU(),),
        page_size=group.page_size,
        is_mla=group.is_mla,
        num_q_heads=n_q_heads,
        kvcache_quant_config=group.kvcache_quant_config,
        value_head_dim=group.value_head_dim,
        recipe=group.recipe,
    )
    # Of a latent the rank is read as value. Configs do not say it; it is a power of two, and the RoPE part is less.
    value_dim = 1 << group.head_dim.bit_length() - 1 if group.is_mla else group.value_dim
    return KernelShape(layer, n_q_heads, value_dim, group.window, DType[experiment.model.dtype])
