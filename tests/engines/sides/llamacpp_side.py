"""In llama.cpp's environment: start a GGUF file with the KV types of an environment file, and generate."""

from __future__ import annotations

import json
import sys

import llama_cpp

TYPES = {
    "f32": llama_cpp.GGML_TYPE_F32,
    "f16": llama_cpp.GGML_TYPE_F16,
    "bf16": llama_cpp.GGML_TYPE_BF16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}

with open(sys.argv[1], encoding="utf-8") as file:
    settings = dict(line.rstrip("\n").split("=", 1) for line in file)
engine = llama_cpp.Llama(
    sys.argv[2],
    n_ctx=int(settings["LLAMA_ARG_CTX_SIZE"]),
    type_k=TYPES[settings["LLAMA_ARG_CACHE_TYPE_K"]],
    type_v=TYPES[settings["LLAMA_ARG_CACHE_TYPE_V"]],
    flash_attn=settings.get("LLAMA_ARG_FLASH_ATTN") == "on",
    verbose=False,
)
answer = engine("The capital of France is", max_tokens=8, temperature=0.0)
print(json.dumps({"text": answer["choices"][0]["text"], "context": engine.n_ctx()}))
