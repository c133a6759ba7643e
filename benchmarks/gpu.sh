#!/usr/bin/env bash
# Everything that needs a GPU, in under eight minutes on one H200: checks, speed, memory. Random weights, no downloads;
# needs torch, transformers, safetensors and numpy. Writes gpu.json into $OUT (default: benchmarks/results).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
