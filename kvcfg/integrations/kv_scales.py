"""Calibrated static scales in the form of checkpoints: what compressed-tensors writes and vLLM reads.

    model.layers.{i}.self_attn.k_scale    float32, [1], or [n_kv_heads, 1, 1] with a scale for each head
    model.layers.{i}.self_attn.v_scale    the same

Here and there a stored number times its scale is the number (x = q * scale), so a scale is the largest magnitude over
the largest number of the format. `quantization_config.json` beside them holds the section that config.json needs, so
that the engine looks for scales at all.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import resolve_recipe
from kvcfg.errors import ConfigError, Problem
from kvcfg.exporters.documents import write_whole
from kvcfg.formats import FORMATS
from kvcfg.integrations.calibrated_layers import calibrate_command
from kvcfg.integrations.calibration import Calibration, Provenance, load_calibration
from kvcfg.integrations.calibration_files import calibration_path

SCALES_FILE = "kv_scales.safetensors"
CONFIG_FILE = "quantization_config.json"
FORMAT = "float8_e4m3fn"
"""The format that checkpoints have scales for."""

_NAME = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mixer|attention)\.(?:[kv]_proj\.|attn\.|qkv_proj\.)?([kv])_scale$"
)


@dataclass(frozen=True, slots=True)
class KVScales:
    """Scales of every layer that has some: entries are None for the others.

    Attributes:
        keys, values: `[1]` or `[n_kv_heads]` float32 each.
    """

    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, calibration: Calibration, *, per_head: bool = False, format_name: str = FORMAT) -> KVScales:
        """The scales for which a format holds the largest magnitudes that were seen."""
        largest = FORMATS[format_name].max_value

        def scales(column: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            found = (None if amax is None else amax if per_head else amax.amax().reshape(1) for amax in column)
            return tuple(None if amax is None else (amax / largest).float() for amax in found)

        return cls(scales(calibration.key_amax), scales(calibration.value_amax))

    @property
    def per_head(self) -> bool:
        """Whether heads have scales of their own."""
        return any(scale is not None and len(scale) > 1 for scale in (*self.keys, *self.values))

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by the names that they have in a checkpoint."""
        return {
            f"model.layers.{layer}.self_attn.{side}_scale": scale.reshape(-1, 1, 1) if self.per_head else scale
            for side, column in (("k", self.keys), ("v", self.values))
            for layer, scale in enumerate(column)
            if scale is not None
        }

    def quantization_config(self) -> dict[str, Any]:
        """The section `quantization_config` of config.json for weights that are not quantized themselves."""
        strategy = "attn_head" if self.per_head else "tensor"
        scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
        return {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": scheme,
        }

    def save(self, folder: str | Path) -> Path:
        """Write both files, each whole or not at all; returns the one with the scales."""
        target = Path(folder).expanduser() / SCALES_FILE
        write_whole(target.with_name(CONFIG_FILE), json.dumps(self.quantization_config(), indent=2) + "\n")
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as scratch:
            scratch.write(save({name: tensor.contiguous() for name, tensor in self.tensors().items()}))
        os.chmod(scratch.name, 0o644)
        os.replace(scratch.name, target)
        return target

    def to_calibration(self, head_dims: tuple[int, ...], n_kv_heads: tuple[int, ...], made: Provenance) -> Calibration:
        """The same scales as a calibration that `quantization.calibration` can name.

        Args:
            head_dims: width of a key, by layer.
            n_kv_heads: KV heads, by layer.
            made: of which model they are.
        """
        largest = FORMATS[FORMAT].max_value

        def amax(column: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            pairs = zip(column, n_kv_heads, strict=True)
            return tuple(None if scale is None else (scale * largest).expand(heads).clone() for scale, heads in pairs)

        shapes = list(zip(self.keys, n_kv_heads, head_dims, strict=True))
        same = tuple(None if key is None else torch.eye(dim).repeat(heads, 1, 1) for key, heads, dim in shapes)
        gains = tuple(None if key is None else torch.zeros(heads) for key, heads, _ in shapes)
        return Calibration(same, amax(self.keys), amax(self.values), gains, made)


def write_scales(experiment: ExperimentConfig, folder: str | Path) -> Path:
    """Write the static scales of an experiment's calibration as a checkpoint has them.

    Raises:
        ConfigError: if its recipe has no static scales, or they were not calibrated.
    """
    recipe = resolve_recipe(experiment)
    if recipe.scale_source != "static":
        rule = "has no calibrated scales to write"
        raise ConfigError(
            Problem("quantization.scale_source", rule, recipe.scale_source, "quantization.scale_source=static")
        )
    if {recipe.key_format.name, recipe.value_format.name} != {FORMAT}:
        rule = f"has no scales in checkpoints, only {FORMAT} has"
        raise ConfigError(Problem("cache.kv_cache_format", rule, recipe.format_name, f"cache.kv_cache_format={FORMAT}"))
    path = calibration_path(experiment)
    calibration = load_calibration(path, mend=calibrate_command(experiment))
    if calibration.provenance.balance_rope:
        rule = "was measured on keys that were balanced as the model was loaded, and engines load them as they are"
        fix = f"kvcfg calibrate quantization.balance_rope=false quantization.calibration={path}"
        raise ConfigError(Problem("quantization.calibration", rule, str(path), fix))
    return KVScales.of(calibration, per_head=recipe.granularity == "head").save(folder)


def read_scales(path: str | Path) -> KVScales:
    """Read the scales of a checkpoint, a folder or one file of it, by any of the names that engines give them.

    Raises:
        ConfigError: if there are none.
    """
    source = Path(path).expanduser()
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    found = {name: tensor for file in files for name, tensor in _scales_in(file)}
    layers = {(int(match[1]), match[2]): tensor for name, tensor in found.items() if (match := _NAME.search(name))}
    if not layers:
        raise ConfigError(Problem("scales", "holds no k_scale or v_scale of any layer", str(path)))
    num_layers = 1 + max(layer for layer, _ in layers)
    return KVScales(*(_column(layers, side, num_layers) for side in ("k", "v")))


def _column(layers: Mapping[tuple[int, str], Tensor], side: str, num_layers: int) -> tuple[Tensor | None, ...]:
    found = (layers.get((layer, side)) for layer in range(num_layers))
    return tuple(None if scale is None else scale.float().reshape(-1) for scale in found)


def _scales_in(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, the file is no mapping
                if _NAME.search(name):
                    yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(Problem("scales", f"cannot be read: {error}", str(file))) from error
