"""What `kvcfg calibrate` measured of one model, and the file that keeps it.

    layers.{i}.key_transform    [n_kv_heads, head_dim, head_dim]    stored keys are k @ key_transform
    layers.{i}.key_amax         [n_kv_heads]                        largest magnitude of any key
    layers.{i}.value_amax       [n_kv_heads]                        largest magnitude of any value
    layers.{i}.key_gain         [n_kv_heads]                        bits per number that key_transform is worth

All are float32 in a safetensors file, whose metadata say of which model and from which text. Layers that keep no keys
of single heads (MLA, linear, shared) have none.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvcfg.errors import ConfigError, Problem

KEY = "quantization.calibration"
_PARTS = ("key_transform", "key_amax", "value_amax", "key_gain")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Of which model a calibration is, and from what it was made.

    Attributes:
        kvcfg_version: the version that made it.
        model: name of the model.
        model_fingerprint: digest of config and weights as they were used (`weights_digest.py`).
        balance_rope: whether RoPE pairs were balanced as the model was loaded.
        num_layers: layers of the model, those that store nothing included.
        text_sha: sha256 of the text.
        first_token, num_tokens: the part of it that was read, in tokens.
        page_size: tokens of the pages whose means were taken away.
        created: when, in UTC.
    """

    kvcfg_version: str
    model: str
    model_fingerprint: str
    balance_rope: bool
    num_layers: int
    text_sha: str
    first_token: int
    num_tokens: int
    page_size: int
    created: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured of a model: an entry for each of its layers, None for those that have no keys of heads.

    Attributes:
        key_transforms: `[n_kv_heads, head_dim, head_dim]` float32 each; stored keys are `k @ key_transform`.
        key_amax, value_amax: `[n_kv_heads]` float32 each, largest magnitudes.
        key_gains: `[n_kv_heads]` float32 each, bits per number that the transform is worth on the text.
        provenance: of which model, from which text.
    """

    key_transforms: tuple[Tensor | None, ...]
    key_amax: tuple[Tensor | None, ...]
    value_amax: tuple[Tensor | None, ...]
    key_gains: tuple[Tensor | None, ...]
    provenance: Provenance

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all; folders are made, an older file is replaced. Returns its path."""
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        columns = (self.key_transforms, self.key_amax, self.value_amax, self.key_gains)
        tensors = {
            f"layers.{layer}.{part}": tensor.contiguous()
            for part, column in zip(_PARTS, columns, strict=True)
            for layer, tensor in enumerate(column)
            if tensor is not None
        }
        said = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in self._provenance().items()
        }
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as scratch:
            try:
                scratch.write(save(tensors, said))
                scratch.close()
                os.chmod(scratch.name, 0o644)
                os.replace(scratch.name, target)
            except BaseException:
                os.unlink(scratch.name)
                raise
        return target

    def to_dict(self) -> dict[str, Any]:
        """Provenance and figures of every layer as plain data, without the matrices."""
        layers = [
            {"layer": layer, "key_gain": gain.tolist(), "key_amax": keys.tolist(), "value_amax": values.tolist()}
            for layer, (gain, keys, values) in enumerate(
                zip(self.key_gains, self.key_amax, self.value_amax, strict=True)
            )
            if gain is not None and keys is not None and values is not None
        ]
        return {**self._provenance(), "layers": layers}

    def _provenance(self) -> dict[str, Any]:
        return asdict(self.provenance)


def load_calibration(path: str | Path, *, mend: str = "kvcfg calibrate") -> Calibration:
    """Read a file that `Calibration.save` wrote.

    Args:
        path: the file.
        mend: the command that would write it anew, for errors.

    Raises:
        ConfigError: if it is not there, or is no whole calibration.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise refusal(source, "is not there", mend)
    try:
        with safe_open(source, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            return _read(metadata, {name: file.get_tensor(name) for name in names})
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise refusal(source, f"is no file that kvcfg calibrate wrote ({_reason(error)})", mend) from error


def refusal(path: str | Path, rule: str, mend: str) -> ConfigError:
    """A calibration that cannot be used, and the command that makes another."""
    return ConfigError(Problem(KEY, rule, str(path), mend))


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def _read(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Calibration:
    known: dict[str, Any] = {}
    for field in fields(Provenance):
        text = metadata[field.name]
        known[field.name] = text if field.type == "str" else json.loads(text)
        if type(known[field.name]).__name__ != field.type:
            raise ValueError(f"{field.name}={text} is no {field.type}")
    provenance = Provenance(**known)
    layers = [_layer(tensors, f"layers.{layer}") for layer in range(provenance.num_layers)]
    transforms, key_amax, value_amax, gains = zip(*layers, strict=True)
    return Calibration(transforms, key_amax, value_amax, gains, provenance)


def _layer(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor | None, ...]:
    """The parts of one layer, or as many Nones."""
    if not any(f"{prefix}.{part}" in tensors for part in _PARTS):
        return (None,) * len(_PARTS)
    found = tuple(tensors[f"{prefix}.{part}"] for part in _PARTS)
    heads, dim = len(found[0]), found[0].shape[-1]
    for tensor, part, shape in zip(found, _PARTS, ((heads, dim, dim), *[(heads,)] * 3), strict=True):
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{prefix}.{part} is {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{prefix}.{part} holds numbers that are not finite")
    return found
