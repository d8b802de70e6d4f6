"""Models and tokenizers as transformers loads them, on the devices that the config asks for."""

from __future__ import annotations

import os
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from kvcfg.config.devices import DevicesConfig, detect
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import BackendUnavailable, ShapeError
from kvcfg.integrations.weights import fetch_weights


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
    elsewhere, and in bfloat16 on GPUs.

    Raises:
        ConfigError: if the config names no source of weights.
        BackendUnavailable: if transformers or a device is missing, or weights cannot be had.
        ShapeError: if the model's layers are not those of the config.
    """
    transformers = import_transformers()
    source = fetch_weights(experiment.model)
    device = torch_device(experiment.devices)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    if experiment.model.outlier_scale != 1.0:
        scale_rope_pair(model, experiment.model.outlier_scale)
    return LoadedModel(model.eval().to(device), load_tokenizer(experiment))


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


@torch.no_grad()
def scale_rope_pair(model: nn.Module, factor: float) -> None:
    """Scale one RoPE pair of every KV head by `factor` in `k_proj`, and by its inverse in `q_proj`, in place.

    Scores are products of queries and keys, so the model computes the same function, while its keys get the
    outlier channels that many checkpoints have: in the pair that rotates slowest, where they are found.

    Args:
        model: a model of the Llama family: `q_proj` and `k_proj`, keys rotated in halves, no norm after.
        factor: what keys are multiplied by.

    Raises:
        ShapeError: if the model is of another family.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    attentions = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "q_proj")]
    if not attentions or any(hasattr(module, "q_norm") or hasattr(module, "k_norm") for module in attentions):
        raise ShapeError(f"model.outlier_scale needs plain q_proj and k_proj, which {config.model_type} has not")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = torch.tensor([head_dim // 2 - 1, head_dim - 1])
    for attention in attentions:
        for projection, scale in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
            for parameter in projection.parameters():  # type: ignore[union-attr]
                parameter.unflatten(0, (-1, head_dim))[:, channels] *= scale
