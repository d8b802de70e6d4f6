"""The YAML under conf/: every file composes, and every key says what it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvcfg

CONF = Path(__file__).parents[2] / "conf"
PRESETS = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "hydra")
NEEDS_FACTS = {"model=hf"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_preset_composes(path: Path) -> None:
    choice = f"{path.parent.name}={path.stem}"
    if choice in NEEDS_FACTS:
        with pytest.raises(kvcfg.ConfigError, match=r"model\.(path|id)"):
            kvcfg.compose([choice])
        return
    beside = {"model": "devices=h100", "experiment": "cache=default"}.get(path.parent.name, "model=llama-3.1-8b")
    kvcfg.compose([beside, choice])


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_carries_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    commented = False
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if stripped.startswith("#"):
            commented = True
        elif key := re.match(r"([\w.]+):(?!:)", stripped):
            explained = commented or " #" in line or key[1] == "defaults"
            assert explained, f"{path.name}:{number}: {key[1]} has no comment"
            commented = stripped.endswith(":")  # a section's comment may speak for its one key
        elif not stripped:
            commented = False
