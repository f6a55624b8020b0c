#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'EOF'
Trains a small GPT on two islands, two processes of this machine's CPU that exchange every 15 steps. Makes the
environment of launch/quickstart.sh first, where there is none. Two minutes on two cores, besides the downloads.

  launch/local_steps.sh [options of examples/local_steps_gpt.py]

  launch/local_steps.sh
  launch/local_steps.sh --every 50 --density 0.01
  launch/local_steps.sh --dense      ordinary DDP, to compare with

Environment: as launch/quickstart.sh.
EOF
}

fail() {
    echo "local_steps: $1" >&2
    exit "${2:-1}"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit; fi
python=$(chosen_python)
if [[ -z $python ]]; then
    check_python python3
    make_environment python3
    python=$venv/bin/python
fi
cd "$root"
# Hides GPUs: NCCL would want one for each process.
CUDA_VISIBLE_DEVICES='' PYTHON=$python exec launch/torchrun.sh --nproc-per-node 2 examples/local_steps_gpt.py "$@"
