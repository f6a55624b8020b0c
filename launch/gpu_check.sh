#!/usr/bin/env bash
# Checks and measures the CUDA side on a machine with a GPU, with the torch that is there and without a network.
#
#   ./launch/gpu_check.sh [--help]
#
# Builds the library in place, then benchmarks/kernels/gpu_check.py runs the tests, compute-sanitizer and the benchmark,
# and writes benchmarks/results/gpu_check.md and .json. PYTHON chooses the interpreter; it has to have torch with CUDA,
# setuptools, pytest, pytest-timeout, tabulate and tqdm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.kernels.gpu_check "$@"
