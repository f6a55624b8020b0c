#!/usr/bin/env bash
# Installs the package and Horovod into an environment of its own and runs every check: lint, types,
# documentation, tests.
#
#   ./launch/test.sh [arguments for pytest]
#
# The environment is .venv-test, or $DGC_TEST_VENV; PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi

venv=${DGC_TEST_VENV:-.venv-test}
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "test.sh: expected Python 3.10 or later; set PYTHON to one" >&2
  exit 1
}
[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python

# Hundreds of processes start: each would compile what it imports, were that not kept.
unset PYTHONDONTWRITEBYTECODE

step() { printf '\n== %s\n' "$*"; }

step "install"
# torch first and pinned: left to itself, pip would choose a build with gigabytes of CUDA.
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,examples]'

step "horovod"
if "$python" -c 'import sys, horovod.torch; sys.exit(horovod.__version__ != "0.28.1")' 2>/dev/null; then
  echo "Horovod 0.28.1 is installed"
else
  PYTHON=$python ./launch/install_horovod.sh
fi

step "ruff"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .

step "mypy --strict"
"$venv/bin/mypy"

step "docs"
PYTHON=$python ./launch/docs.sh

step "clang-format"
find csrc benchmarks tests -regex '.*\.\(cpp\|h\|cu\|cuh\)' -print0 | xargs -0 "$venv/bin/clang-format" --dry-run --Werror

step "workflow"
"$venv/bin/check-jsonschema" --builtin-schema vendor.github-workflows .github/workflows/*.yml

step "shell syntax"
for script in launch/*.sh launch/*.sbatch .ci/run; do bash -n "$script"; done

step "pytest"
# Files side by side, one more than there are cores: many tests wait for processes to start and for timeouts to pass. One
# thread each, since ranks and files share the cores. A worker that crashes ends the run: with another in its place,
# xdist may wait for ever. The longest files come first (tests/conftest.py), and xdist is to leave them there.
cores=$(nproc)
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/pytest" \
  --numprocesses "$((cores < 4 ? cores + 1 : 4))" --max-worker-restart 0 --dist loadfile --no-loadscope-reorder "$@"
