#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'USAGE'
Starts a training script with horovodrun: one process for each GPU, or for each core where there is no GPU.

  launch/horovodrun.sh [horovodrun options] script.py [script options]

One machine:
  launch/horovodrun.sh examples/horovod_mnist.py
  launch/horovodrun.sh -np 2 examples/horovod_mnist.py --dense
Two machines with four processes each, started from one of them:
  launch/horovodrun.sh -np 8 -H host1:4,host2:4 examples/horovod_mnist.py
Elastic, with a script that uses horovod.torch.elastic; hosts.sh prints a line host:processes for each machine there is:
  launch/horovodrun.sh -np 2 --min-np 2 --max-np 4 --host-discovery-script ./hosts.sh train.py

Several machines need
  - ssh to each of them without a password: ssh host2 true
  - the repository and the environment on each, under the same path, the environment with the same versions
  - one network that joins them, whose interface has the same name on each. horovodrun tries them out; where it finds
    none or a wrong one (docker0), name it: --network-interfaces eth0
A machine's own name must not lead to 127.0.1.1 (/etc/hosts): horovodrun would take it for another machine.
Elastic runs wait for a second machine, unless --network-interfaces is given (lo on one machine).

All options of horovodrun work (python3 -m horovod.runner.launch --help). Added where you do not give them:
  -np      number of GPUs, else of cores; not with -H, --hostfile or --host-discovery-script, and not under LSF
  python   in front of script.py
Environment, passed on to all machines except for CUDA_VISIBLE_DEVICES:
  PYTHON            the Python that has Horovod (default: that of the activated environment, else that of the
                    environment that launch/install_horovod.sh makes, else python3)
  OMP_NUM_THREADS   threads of each process (default: cores / processes of a machine; unset where that is not known)
  MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_
                    freed memory that a process keeps, where there is no GPU (default: 256 and 32 MiB)
USAGE
}

python=$(find_python)
processes=
machines=${LSB_JOBID:-} # whatever names them: LSF, an option
option=
for ((i = 1; i <= $#; i++)); do
    argument=${!i}
    case $option in
        -np | --num-proc) processes=$argument ;;
        -H | --hosts) machines=$argument ;;
        --host-discovery-script) option= && continue ;; # may end in .py
    esac
    option=$argument
    case $argument in
        -h | --help) usage && exit ;;
        -np=* | --num-proc=*) processes=${argument#*=} ;;
        -H* | --hosts* | -hostfile* | --hostfile* | --host-discovery-script*) machines=$argument ;;
        python | python3* | */bin/python*) break ;; # what follows is the script's
        *.py)
            set -- "${@:1:i-1}" "$python" "${@:i}"
            break
            ;;
    esac
done
if [[ $# == 0 ]]; then usage >&2 && exit 2; fi

# The counts are printed first: where there are none, it is torch that is missing.
if ! counts=$("$python" -c 'import os, torch
print(len(os.sched_getaffinity(0)), torch.cuda.device_count())
import horovod.torch'); then
    if [[ -z $counts ]]; then
        echo "horovodrun.sh: $python has no torch. Activate your environment, or set PYTHON; \
launch/install_horovod.sh makes one where there is neither" >&2
    else
        echo "horovodrun.sh: $python has no Horovod that works with its torch. \
PYTHON=$python launch/install_horovod.sh installs it" >&2
    fi
    exit 1
fi
read -r cores gpus <<<"$counts"
if [[ $gpus == 0 ]]; then keep_freed_memory; fi
if [[ -z $processes && -z $machines ]]; then
    processes=$((gpus > 0 ? gpus : cores))
    set -- -np "$processes" "$@"
fi

# torch's own choice is all cores, for each process. The first machine speaks for all.
if [[ $machines =~ :([0-9]+) ]]; then processes=${BASH_REMATCH[1]}; elif [[ -n $machines ]]; then processes=; fi
if [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
fi

exec "$python" -m horovod.runner.launch "$@"
