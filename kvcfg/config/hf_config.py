"""Facts about a Hugging Face model from its config.json: integers, read without torch or transformers.

`n_params` comes from the headers of the safetensors files beside config.json. Where those are not there, or hold
packed numbers, it is estimated from the dimensions, to within a few percent. A multimodal model is read as its
language model, whose cache holds everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcfg.config.hf_layers import QUERY_HEADS, Numbers, fill_defaults, need, read_layer_groups
from kvcfg.config.hf_weights import ParameterCount, StoredWeights, estimate_parameters, read_stored_weights
from kvcfg.config.model import LayerGroup
from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError, Problem

CONFIG_NAME = "config.json"
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")

_LANGUAGE_MODEL_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
_COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
_FIXES = {
    "max_seq_len": "max_seq_len=8192",
    "dtype": "dtype=bfloat16",
    "n_params": "n_params=7000000000",
    "weight_bits": "weight_bits=4.5",
}


def read_facts(path: str | None, model_id: str | None, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of `ModelConfig`.

    Args:
        path: folder that holds config.json, and perhaps the weights.
        model_id: name on the Hub, looked up in its local cache first; not looked at if there is a path.
        stated: fields whose value is known already, which therefore may be missing.

    Raises:
        ConfigError: with every field that cannot be read; keys are relative to the `model` group.
    """
    key, source, file = _find(path, model_id)
    whole = _read_json(file, key, source)
    config = fill_defaults(_language_model(whole))
    weights = read_stored_weights(file.parent)
    quantization = whole.get("quantization_config") or config.get("quantization_config") or {}
    dtype = stated.get("dtype") or _compute_dtype(whole, config, weights)
    groups = read_layer_groups(config, DType[dtype].size_in_bytes if dtype in _COMPUTE_DTYPES else 2)
    facts = {
        "name": source.rstrip("/").rsplit("/", 1)[-1],
        "layer_groups": groups,
        "num_q_heads": need(config, *QUERY_HEADS),
        "max_seq_len": next((config[key] for key in CONTEXT_KEYS if config.get(key)), None),
        "dtype": dtype,
        **_weight_facts(config, groups, weights, quantization),
    }
    needed = [key for key in _FIXES if key != "weight_bits" or quantization]
    problems = [
        Problem(key, f"can neither be read nor worked out from {file}; state it", None, _FIXES[key])
        for key in needed
        if facts[key] is None and key not in stated
    ]
    if problems:
        raise ConfigError(problems)
    return facts


def _find(path: str | None, model_id: str | None) -> tuple[str, str, Path]:
    """Which field leads to the model, its value, and the config.json it leads to."""
    if path is not None:
        return "path", path, Path(path).expanduser() / CONFIG_NAME
    if model_id is not None:
        return "id", model_id, _hub_config(model_id)
    rule = "must be a folder with a config.json, or id a name on the Hub, where layer_groups is null"
    raise ConfigError(Problem("path", rule, None, "id=HuggingFaceTB/SmolLM2-135M-Instruct"))


def _hub_config(model_id: str) -> Path:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise _not_on_hub(model_id, "can only be looked up with huggingface_hub: pip install 'kvcfg[hf]'") from None
    try:
        cached = try_to_load_from_cache(model_id, CONFIG_NAME)
        if isinstance(cached, str):
            return Path(cached)
        get_hf_file_metadata(hf_hub_url(model_id, CONFIG_NAME))  # fails at once where a download would try for long
        return Path(hf_hub_download(model_id, CONFIG_NAME))
    except (HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise _not_on_hub(model_id, f"must be a model on the Hugging Face Hub that you may read ({reason})") from error
    except Exception as error:  # which error means no connection depends on the HTTP client, and that on the version
        rule = "is not in the local Hugging Face cache, and the Hub cannot be reached from here"
        raise _not_on_hub(model_id, rule) from error


def _not_on_hub(model_id: str, rule: str) -> ConfigError:
    return ConfigError(Problem("id", rule, model_id, "path=/folder/with/config.json"))


def _read_json(file: Path, key: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(Problem(key, "must be a folder with a config.json", source)) from None
    except ValueError as error:
        raise ConfigError(Problem(key, f"holds a config.json that is no JSON ({error})", source)) from None
    if not isinstance(content, dict):
        raise ConfigError(Problem(key, "holds a config.json that is no JSON object", source))
    return content


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal config that describes the language model; the config itself if it is one."""
    for key in _LANGUAGE_MODEL_KEYS:
        if isinstance(config.get(key), dict):
            outer = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
            return {**outer, **_language_model(config[key])}
    return config


def _compute_dtype(whole: Numbers, config: Numbers, weights: StoredWeights | None) -> str | None:
    for name in (config.get("dtype"), config.get("torch_dtype"), whole.get("dtype"), whole.get("torch_dtype")):
        if isinstance(name, str):
            return name.removeprefix("torch.")
    return None if weights is None else weights.dtype


def _weight_facts(
    config: Numbers, groups: tuple[LayerGroup, ...], weights: StoredWeights | None, quantization: Numbers
) -> dict[str, Any]:
    estimate = _try_to_estimate(config, groups)
    if weights is not None and not quantization:
        total: int | None = weights.num_elements
    else:
        total = None if estimate is None else estimate.total
    unused = 0 if estimate is None else estimate.total - estimate.active
    return {
        "n_params": total,
        "n_active_params": total - unused if total is not None and 0 < unused < total else None,
        "weight_bits": _quantized_bits(quantization, weights, total) if quantization else None,
    }


def _try_to_estimate(config: Numbers, groups: tuple[LayerGroup, ...]) -> ParameterCount | None:
    try:
        return estimate_parameters(config, groups)
    except ConfigError:
        return None


def _quantized_bits(quantization: Numbers, weights: StoredWeights | None, n_params: int | None) -> float | None:
    """Bits per parameter of a quantized checkpoint: measured where the files are there, else as its method says."""
    if weights is not None and n_params:
        return round(weights.num_bytes * 8 / n_params, 3)
    bits = 8 if quantization.get("quant_method") in ("fp8", "fbgemm_fp8") else quantization.get("bits")
    return None if bits is None else float(bits)
