#!/usr/bin/env bash
# Installs Horovod 0.28.1 from its source package beside the torch of an environment, and checks that it runs.
#
#   ./launch/install_horovod.sh [--help]
#
# The environment is the one of PYTHON, else the activated one; it has to have torch. Where there is neither, it is the
# one of launch/quickstart.sh, .venv or $DGC_VENV, which is made if need be.
# The released source asks for C++14, current torch needs C++20; nothing else is changed. Five minutes on two cores; the
# wheel is kept in $DGC_CACHE (~/.cache/torch-dgc), by version of torch and Python, so that the next call takes seconds.
# Needs g++; cmake is installed where it is missing. Gloo only, unless the usual settings say otherwise
# (HOROVOD_GPU_OPERATIONS=NCCL, HOROVOD_WITH_MPI=1, ...).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi

version=0.28.1
sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0

fail() {
  echo "install_horovod.sh: $*" >&2
  exit 1
}

command -v "${CXX:-g++}" >/dev/null || fail "expected ${CXX:-g++}, found none. Install it (apt install g++, dnf install gcc-c++)"
python=$(chosen_python)
if [[ -z $python ]]; then
  check_python python3
  make_environment python3
  python=$venv/bin/python
fi
tag=$("$python" -c 'import platform, sys, torch; print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")') ||
  fail "expected torch in $python, found none. Install it there first, or leave PYTHON unset and no environment active: \
one is then made, with torch"
pip=("$python" -m pip --disable-pip-version-check)
# CMake comes with the environment, if at all: its scripts come first.
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
export PATH

# Whatever decides how it is built is part of the name.
settings=$({ env | grep '^HOROVOD_' || true; } | sort | cksum | cut -d' ' -f1)
wheels=${DGC_CACHE:-$HOME/.cache/torch-dgc}/horovod-$version-$tag-$settings
if ! compgen -G "$wheels/*.whl" >/dev/null; then
  command -v cmake >/dev/null || "${pip[@]}" install --quiet cmake
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "== download"
  echo "horovod==$version --hash=sha256:$sha256" >"$work/requirements.txt"
  "${pip[@]}" install --quiet setuptools wheel packaging
  "${pip[@]}" download --quiet --no-deps --no-binary :all: --no-build-isolation --require-hashes \
    -r "$work/requirements.txt" -d "$work"
  tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
  source=$work/horovod-$version
  sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
  [[ $(grep -l 'CMAKE_CXX_STANDARD 20' "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt" | wc -l) == 2 ]] ||
    fail "expected CMAKE_CXX_STANDARD 14 in Horovod's two CMakeLists.txt, found something else"
  echo "== build (some five minutes; log: $work/build.log)"
  export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=${HOROVOD_WITH_GLOO:-1} HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
  [[ -n "${HOROVOD_WITH_MPI:-}" ]] || export HOROVOD_WITHOUT_MPI=1
  export CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS=-j$(nproc)
  "${pip[@]}" wheel --no-build-isolation --no-deps --wheel-dir "$work/wheel" "$source" >"$work/build.log" 2>&1 || {
    tail -n 30 "$work/build.log" >&2
    fail "the build failed; above are its last lines"
  }
  mkdir -p "$wheels"
  cp "$work"/wheel/*.whl "$wheels/"
fi

echo "== install"
"${pip[@]}" install --quiet cloudpickle psutil pyyaml packaging cffi
# Forced: the same version may be there already, built for a torch that has been replaced since.
"${pip[@]}" install --quiet --no-deps --force-reinstall "$wheels"/*.whl

echo "== check"
check=$(mktemp --suffix=.py)
trap 'rm -rf "$check" "${work:-}"' EXIT
cat >"$check" <<'PY'
import horovod.torch as hvd
import torch

hvd.init()
total = hvd.allreduce(torch.ones(3) * (hvd.rank() + 1), op=hvd.Sum)
assert hvd.size() == 2, hvd.size()
assert total.tolist() == [3.0, 3.0, 3.0], total
PY
horovodrun --gloo -np 2 -H localhost:2 "$python" "$check" || fail "Horovod is installed, but two processes did not add up"
echo "Horovod $version works with $tag"
