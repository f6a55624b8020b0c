#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'EOF'
Installs DGC into an environment of its own, then trains a CNN on 5,000 MNIST digits twice, with ordinary DDP and with
DGC, and compares the two. Needs Python 3.10 or later and g++, no GPU; on two cores it takes about three minutes and the
time of the downloads.

  launch/quickstart.sh [options]

  --density D        share of the gradient that DGC sends, in (0, 1]   (default: 0.001)
  --warmup-steps N   steps until that density                          (default: a fifth of the run)
  --epochs N         passes over the training images                   (default: 20)
  --processes N      on this machine                                   (default: 2)
  --seed N           of weights and order of images                    (default: 0)
  --help

Environment:
  DGC_VENV       folder of the environment   (default: .venv in the repository)
  PYTHON         Python that makes it        (default: python3)
  DGC_NATIVE=0   go on without g++: plain PyTorch kernels, slower
pip's own settings hold. The CPU build of torch is by far the smaller download: name its index, which PyTorch's install
page gives, in PIP_EXTRA_INDEX_URL, and pip prefers it.
EOF
}

fail() {
    echo "quickstart: $1" >&2
    exit "${2:-1}"
}

python=${PYTHON:-python3}
check_python "$python"

# 1. Options, checked before anything is installed.
density=0.001 epochs=20 processes=2 seed=0 warmup_steps=
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage && exit ;;
        --density | --warmup-steps | --epochs | --processes | --seed) ;;
        *) fail "unknown option $1; --help lists them" 2 ;;
    esac
    [[ $# -ge 2 ]] || fail "$1: expected a value" 2
    case $1 in
        --density)
            "$python" -c 'import sys; sys.exit(not 0 < float(sys.argv[1]) <= 1)' "$2" 2>/dev/null ||
                fail "$1: expected a number in (0, 1], got $2" 2
            ;;
        --warmup-steps | --seed) [[ $2 =~ ^[0-9]+$ ]] || fail "$1: expected an integer >= 0, got $2" 2 ;;
        *) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1: expected an integer >= 1, got $2" 2 ;;
    esac
    case $1 in
        --density) density=$2 ;;
        --warmup-steps) warmup_steps=$2 ;;
        --epochs) epochs=$2 ;;
        --processes) processes=$2 ;;
        --seed) seed=$2 ;;
    esac
    shift 2
done

# 2. Installation, where it has not been done.
make_environment "$python"
cd "$root"

# 3. Two runs and their comparison.
runs=runs/quickstart
train() {
    # Hides GPUs: NCCL would want one for each process.
    CUDA_VISIBLE_DEVICES='' PYTHON=$venv/bin/python launch/torchrun.sh --nproc-per-node "$processes" \
        examples/mnist.py --epochs "$epochs" --seed "$seed" "$@"
}
echo "== Ordinary DDP, $processes processes"
train --dense --log-file "$runs/dense.json"
echo "== DGC, $processes processes"
train --density "$density" ${warmup_steps:+--warmup-steps "$warmup_steps"} --log-file "$runs/dgc.json"
echo
"$venv/bin/python" examples/report.py "$runs/dense.json" "$runs/dgc.json" --picture "$runs/curves.png"
