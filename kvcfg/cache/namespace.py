"""What decides the content of a page besides its tokens: part of every page's name.

Two caches whose namespaces differ never take each other's pages for their own, wherever they are kept.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvcfg.cache.prefix import fingerprint
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.model import ModelConfig
from kvcfg.config.recipes import balances_rope
from kvcfg.group_params import KVCacheParams

LAYOUT = "layers, key elements, value elements, key scales, value scales"
"""Order of the bytes of a page. A change of it must change this text, or old pages would be misread."""


def namespace(experiment: ExperimentConfig, *, adapter: str | None = None, calibration: str | None = None) -> bytes:
    """The namespace of an experiment's pages, 32 bytes.

    It covers model and adapter, RoPE scaling (a local model's config.json), RoPE-pair balancing, formats and recipe of
    every group and layer, the dtype that keys and values are computed in, and the layout of a page on its shards.

    Args:
        experiment: what is cached and how.
        adapter: name or digest of the adapter that the model runs with, such as a LoRA.
        calibration: digest of the matrices and scales that were measured beforehand.
    """
    params = experiment.to_params()
    return fingerprint(
        {
            "model": model_identity(experiment.model),
            "balanced": balances_rope(experiment),
            "adapter": adapter,
            "source_dtype": experiment.model.dtype,
            "calibration": calibration,
            "layers": [item.model_dump(mode="json") for item in experiment.quantization.layers or ()],
            "layout": LAYOUT,
            "page_size": params.page_size,
            "tensor_parallel_degree": params.tensor_parallel_degree,
            "groups": [_stored_as(group) for group in params.params],
        }
    )


def _stored_as(group: KVCacheParams) -> list[object]:
    heads = [group.n_kv_heads, group.head_dim, group.value_dim, group.num_layers]
    return [group.kind, group.window, *heads, str(group.storage)]


def model_identity(model: ModelConfig) -> list[object]:
    """Which weights: packages and ids are their name; a folder is its config.json and its files' sizes and times."""
    known: list[object] = [model.name, model.package, model.id, model.outlier_scale]
    if model.path is None:
        return known
    folder = Path(model.path).expanduser()
    config = folder / "config.json"
    said = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    files = [file for file in sorted(folder.glob("*")) if file.is_file()]
    return [*known, said, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]
