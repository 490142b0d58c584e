#!/usr/bin/env bash
# Run the GPU acceptance on a machine that is available for minutes; nothing is installed or fetched.
#   benchmarks/gpu_lease.sh --packages DIR --output DIR [--results DIR] [--more] [--minutes 13] [--device cpu --small]
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_lease "$@"
