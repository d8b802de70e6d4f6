"""Engines start SmolLM2 with an export and answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcfg.composition import compose
from kvcfg.exporters import export
from kvcfg.planning import plan
from tests.engines.conftest import Ask

pytestmark = [pytest.mark.engines, pytest.mark.model]

SMALL = (
    "model=smollm2-135m",
    "devices=cpu",
    "devices.memory_gib=4",
    "workload.max_batch_size=4",
    "workload.max_seq_len=1024",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as transformers saves it."""
    import kvcfg

    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = kvcfg.load(compose(["quantization=none", "cache.kv_cache_format=bfloat16"]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page_size", [32, 128])
def test_vllm_answers_with_as_many_blocks_as_were_planned(
    page_size: int, checkpoint: Path, ask: Ask, tmp_path: Path
) -> None:
    experiment = compose([*SMALL, f"cache.kv_cache_page_size={page_size}"])
    made = export(experiment, "vllm")
    path = tmp_path / "vllm.yaml"
    path.write_text(made.text.replace("model: MODEL", f"model: {checkpoint}"), encoding="utf-8")
    found = ask("vllm", "vllm", path, "run")
    assert "Paris" in found["text"] and found["block_size"] == page_size
    assert 0 <= found["blocks"] - plan(experiment).num_pages <= 2  # the null page, and what tables take here


def test_vllm_answers_from_fp8(checkpoint: Path, ask: Ask, tmp_path: Path) -> None:
    made = export(compose([*SMALL, "quantization=fp8_unit"]), "vllm")
    path = tmp_path / "vllm.yaml"
    path.write_text(made.text.replace("model: MODEL", f"model: {checkpoint}"), encoding="utf-8")
    found = ask("vllm", "vllm", path, "run")
    assert found["dtype"] == "fp8_e4m3" and found["text"].strip()


@pytest.mark.parametrize("bits", [16, 8])
def test_llamacpp_answers_with_the_types_of_its_file(bits: int, ask: Ask, tmp_path: Path) -> None:
    from kvcfg.integrations.weights import fetch_weights

    blocks = ["granularity=block", "quantization_granularity=32", "scale_dtype=float16"]
    stored = ["cache.kv_cache_format=float16"] if bits == 16 else ["cache.kv_cache_format=int8"]
    overrides = [*SMALL, *stored, *([f"quantization.{item}" for item in blocks] if bits == 8 else [])]
    experiment = compose(overrides)
    path = tmp_path / "llamacpp.env"
    path.write_text(export(experiment, "llamacpp").text, encoding="utf-8")
    [weights] = sorted(Path(fetch_weights(experiment.model)).rglob("*.gguf"))[:1]
    found = ask("llamacpp", "llamacpp", path, weights)
    assert found["context"] == 4096 and found["text"].strip()
