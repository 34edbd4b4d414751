#!/usr/bin/env bash
# What only a GPU can tell, in nine minutes at most, as one JSON file:
#
#     benchmarks/device.sh            on a GPU
#     benchmarks/device.sh --tiny     the same sections on a CPU, small
#
# PYTHON: an interpreter with this project's packages and JAX for CUDA; for the
#   comparisons torch built for CUDA, transformers and diffusers (python3).
# WHEELS: a folder of wheels of what it lacks; they are put into a virtual
#   environment beside its own packages. Nothing is downloaded.
# OUT: folder of device.json (benchmarks/results).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
BEGUN=$(date +%s)
if [ -n "${WHEELS:-}" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$PYTHON" -m venv --system-site-packages "$scratch/venv"
  "$scratch/venv/bin/python" -m pip install -q --no-index --no-deps \
    "$WHEELS"/*.whl
  PYTHON="$scratch/venv/bin/python"
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" \
  "$PYTHON" benchmarks/device.py --out "$OUT" --begun "$BEGUN" "$@"
