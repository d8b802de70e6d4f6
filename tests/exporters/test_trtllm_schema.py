"""TensorRT-LLM's published options, as far as exports name them; it forbids every other key.

Names, types and bounds are those of `tensorrt_llm/llmapi/llm_args.py` of 1.2 (KvCacheConfig, BaseLlmArgs, decoding
configs), read from its source and not imported: the package needs CUDA.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from kvcfg.composition import compose
from kvcfg.errors import ConfigError
from kvcfg.exporters import export
from tests.exporters.cases import CASES, LLAMA


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KvCache(Strict):
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: Annotated[float, Field(ge=0, le=1)] = 0.9
    host_cache_size: int | None = None
    max_gpu_total_bytes: Annotated[int, Field(ge=0)] = 0
    tokens_per_block: int = 32
    dtype: Literal["auto", "fp8", "nvfp4", "bfloat16", "float16", "float32"] = "auto"


class Eagle(Strict):
    decoding_type: Literal["Eagle"]
    max_draft_len: Annotated[int, Field(gt=0)]
    speculative_model_dir: str


class Mtp(Strict):
    decoding_type: Literal["MTP"]
    num_nextn_predict_layers: int


class DraftTarget(Strict):
    decoding_type: Literal["Draft_Target"]
    max_draft_len: Annotated[int, Field(gt=0)]
    speculative_model_dir: str


class Options(Strict):
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    enable_attention_dp: bool = False
    max_batch_size: int | None = None
    max_seq_len: int | None = None
    kv_cache_config: KvCache
    speculative_config: Annotated[Eagle | Mtp | DraftTarget, Field(discriminator="decoding_type")] | None = None


MORE = {
    "mtp": (*LLAMA, "speculative=mtp"),
    "standalone": (*LLAMA, "speculative=standalone"),
    "replicas": (*LLAMA, "devices.count=4", "devices.data_parallel_degree=4"),
    "float32": (*LLAMA, "cache.kv_cache_format=float32"),
}


@pytest.mark.parametrize("case", CASES | MORE)
def test_export_is_of_the_published_options(case: str) -> None:
    try:
        made = export(compose((CASES | MORE)[case]), "trtllm")
    except ConfigError:
        pytest.skip("refused")
    assert Options.model_validate(made.settings).kv_cache_config.max_gpu_total_bytes > 0
