#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'EOF'
Starts a training script with torchrun: one process for each GPU, or for each core where there is no GPU.

  launch/torchrun.sh [torchrun options] script.py [script options]

One machine:
  launch/torchrun.sh examples/mnist.py
  launch/torchrun.sh --nproc-per-node 2 examples/mnist.py --dense
Two machines, the same line on both; host1 is the name of one of them:
  launch/torchrun.sh --nnodes 2 --rdzv-backend c10d --rdzv-endpoint host1:29500 examples/mnist.py
Two machines, numbered by hand; 0 on host1, 1 on the other:
  launch/torchrun.sh --nnodes 2 --node-rank 0 --master-addr host1 --master-port 29500 examples/mnist.py

All options of torchrun work (python3 -m torch.distributed.run --help). Added where you do not give them:
  --standalone       unless --nnodes, --rdzv-... or --master-... is there
  --nproc-per-node   number of GPUs, else of cores
A script option with which one of torchrun's begins (--log: --log-dir) needs -- in front of the script.
Environment:
  PYTHON             the Python that has torch (default: that of the activated environment, else that of the
                     environment that launch/quickstart.sh makes, else python3)
  OMP_NUM_THREADS    threads of each process (default: cores / processes)
  MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_
                     freed memory that a process keeps, where there is no GPU (default: 256 and 32 MiB)
  GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
                     network interface, e.g. eth0, where the machines find no way to each other
EOF
}

python=$(find_python)
standalone=yes
processes=
option=
for argument in "$@"; do
    # torchrun reads --nproc_per_node as --nproc-per-node.
    if [[ $option == --nproc-per-node ]]; then processes=$argument; fi
    option=${argument//_/-}
    case $option in
        -h | --help) usage && exit ;;
        --nproc-per-node=*) processes=${argument#*=} ;;
        --standalone | --nnodes* | --rdzv-* | --master-*) standalone= ;;
        *.py | -m | --module | --) break ;; # what follows is the script's
    esac
done
if [[ $# == 0 ]]; then usage >&2 && exit 2; fi

if ! counts=$("$python" -c 'import os, torch; print(len(os.sched_getaffinity(0)), torch.cuda.device_count())'); then
    echo "torchrun.sh: $python has no torch. Activate your environment, or set PYTHON; launch/quickstart.sh makes one" >&2
    exit 1
fi
read -r cores gpus <<<"$counts"
if [[ $gpus == 0 ]]; then keep_freed_memory; fi
if [[ -z $processes ]]; then
    processes=$((gpus > 0 ? gpus : cores))
    set -- --nproc-per-node "$processes" "$@"
fi
if [[ -n $standalone ]]; then set -- --standalone "$@"; fi

# torchrun's own choice is 1, which leaves cores idle where processes are fewer.
if [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
fi
# With --max-restarts: after a worker was killed, restarted gloo workers would otherwise read the first attempt's dead
# addresses from the store that torchrun shares with them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "$python" -m torch.distributed.run "$@"
