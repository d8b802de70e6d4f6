"""Models and tokenizers as transformers loads them, on the devices that the config asks for."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kvcfg.config.devices import DevicesConfig, detect
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import balances_rope
from kvcfg.errors import BackendUnavailable, ShapeError
from kvcfg.integrations.rope_balance import balance_rope_pairs
from kvcfg.integrations.rope_layers import rope_layers
from kvcfg.integrations.weights import fetch_weights

_log = logging.getLogger("kvcfg")


class LoadedModel(NamedTuple):
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any


def import_transformers() -> ModuleType:
    """The transformers library, quiet.

    Raises:
        BackendUnavailable: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackendUnavailable("running a model needs transformers: pip install 'kvcfg[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load(experiment: ExperimentConfig) -> LoadedModel:
    """The model of an experiment, ready to run, and its tokenizer; fetches the weights on first use.

    The model computes in float32 on CPUs, so that figures are about the cache and not about rounding
    elsewhere, and in bfloat16 on GPUs. Where the recipe asks for it, its RoPE pairs are balanced. On CPUs its
    attention reads pages where they lie; `model.set_attn_implementation("sdpa")` gathers them instead.

    Raises:
        ConfigError: if the config names no source of weights.
        BackendUnavailable: if transformers or a device is missing, or weights cannot be had.
        ShapeError: if the config asks for a change of the keys that this model cannot be given.
    """
    transformers = import_transformers()
    source = fetch_weights(experiment.model)
    device = torch_device(experiment.devices)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    if experiment.model.outlier_scale != 1.0:
        scale_rope_pair(model, experiment.model.outlier_scale)
    if balances_rope(experiment):
        _balance(model, asked=experiment.quantization.balance_rope is not None)
    model = model.eval().to(device)
    # Imports transformers, which this module does not before it is needed.
    from kvcfg.integrations.paged_attention import read_pages_in_place

    read_pages_in_place(model)
    return LoadedModel(model, load_tokenizer(experiment))


def load_tokenizer(experiment: ExperimentConfig) -> Any:
    """The tokenizer of an experiment's model; fetches it on first use."""
    return _tokenizer(fetch_weights(experiment.model))


@lru_cache(maxsize=4)
def _tokenizer(source: str) -> Any:
    # The fast tokenizer warns and falls back to one thread once a process forks; nothing here is hurt by that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return import_transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def torch_device(devices: DevicesConfig) -> torch.device:
    """The torch device of the first shard.

    Raises:
        BackendUnavailable: if GPUs are asked for and torch sees none.
    """
    if detect(devices).kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            f"devices={devices.name} asks for a GPU, and torch {torch.__version__} sees none. Try: devices=cpu"
        )
    return torch.device("cuda", 0)


def scale_rope_pair(model: Any, factor: float) -> None:
    """Scale one RoPE pair of every KV head by `factor`, and the queries that read it by its inverse, in place.

    Scores are products of queries and keys, so the model computes the same function, while its keys get the
    outlier channels that many checkpoints have: in the pair that turns slowest, where they are found.

    Args:
        model: a causal language model of transformers.
        factor: what keys are multiplied by.

    Raises:
        ShapeError: if it is not known where the model makes and rotates its keys.
    """
    try:
        layers = rope_layers(model)
    except ShapeError as error:
        raise ShapeError(f"model.outlier_scale={factor:g}: {error}. Try: model.outlier_scale=1") from error
    for layer in layers:
        slowest = layer.pair_of == layer.num_pairs - 1
        layer.scale_keys(torch.where(slowest, factor, 1.0).double().expand(layer.keys.scaled_heads, -1))


def _balance(model: Any, *, asked: bool) -> None:
    """Balance RoPE pairs; a model that cannot be is refused if that was asked for, and else left as it is."""
    try:
        balance_rope_pairs(model)
    except ShapeError as error:
        if asked:
            key = "quantization.balance_rope"
            raise ShapeError(f"{key}=true: {error}. Try: {key}=false") from error
        _log.warning("RoPE pairs are not balanced: %s", error)
