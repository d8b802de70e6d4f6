"""What config.json calls a model's architecture: engines turn settings off by that name."""

from __future__ import annotations

import json
from pathlib import Path

from kvcfg.config.model import ModelConfig

OF_PRESETS = {  # those of the presets that an engine treats unlike others, by their name on the Hub
    "google/gemma-3-12b-it": "Gemma3ForConditionalGeneration",
    "google/gemma-3-27b-it": "Gemma3ForConditionalGeneration",
    "Qwen/Qwen3.5-9B": "Qwen3_5ForConditionalGeneration",
}


def architectures_of(model: ModelConfig) -> tuple[str, ...]:
    """The names in config.json of the model's folder, or that of a preset; empty if neither says it."""
    if model.path is not None:
        file = Path(model.path).expanduser() / "config.json"
        try:
            names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or ()
        except (OSError, ValueError, AttributeError):
            return ()
        return tuple(map(str, names))
    return (OF_PRESETS[model.id],) if model.id in OF_PRESETS else ()
