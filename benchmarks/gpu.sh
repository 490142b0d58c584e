#!/usr/bin/env bash
# The acceptance on a CUDA GPU, from a plain checkout, with the libraries that are here; nothing is installed or fetched.
#   benchmarks/gpu.sh [prepare|cuda|torch|ort-cuda|tensorrt ...] --output DIR [--device cpu --small]
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
