#!/usr/bin/env bash
# The peers that are packages of their own, into a folder ($1, default .peers/quality) that only run.py reads.
set -euo pipefail
peers=${1:-.peers/quality}
mkdir -p "$peers"
# Without what they depend on: torch and transformers are those that kvcfg runs with.
"${PYTHON:-python3}" -m pip install --quiet --upgrade --no-deps --target "$peers" \
  optimum-quanto==0.2.7 hqq==0.2.8.post1 ninja==1.13.2 termcolor==3.3.0
