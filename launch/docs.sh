#!/usr/bin/env bash
# Checks the documentation (links of the .md files, docstrings of the public API) and builds the API reference.
#
#   ./launch/docs.sh [--help]
#
# The reference is build/docs/index.html; some seconds. Needs torch and pdoc, and each framework for its page.
# The Python is that of PYTHON, else the activated environment's, else that of .venv-test ($DGC_TEST_VENV), which
# launch/test.sh makes, else python3.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi

fail() {
  echo "docs.sh: $*" >&2
  exit 1
}

cd "$root"
python=$(chosen_python)
if [[ -z $python ]]; then
  python=${DGC_TEST_VENV:-.venv-test}/bin/python
  if [[ ! -x $python ]]; then python=python3; fi
fi
"$python" -c 'import torch, pdoc' ||
  fail "expected torch and pdoc in $python, found not both. PYTHON chooses another; launch/test.sh makes an environment"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
"$python" docs/check_docs.py

modules=(dgc) # with dgc.checkpoint, which it names in __all__
for framework in horovod accelerate lightning transformers torchft; do
  if "$python" -c "import sys, importlib.util; sys.exit(importlib.util.find_spec('$framework') is None)"; then
    modules+=("dgc.$framework")
  else
    echo "NOT BUILT: the page of dgc.$framework, since $framework is not installed (docs/frameworks.md, docs/horovod.md)"
  fi
done
rm -rf build/docs
"$python" -m pdoc --docformat google --output-directory build/docs "${modules[@]}"
# pdoc warns of a module that it cannot import, and goes on.
for page in index "${modules[@]//.//}" dgc/checkpoint; do
  [[ -f build/docs/$page.html ]] || fail "expected build/docs/$page.html, which pdoc did not write; above is why"
done
echo "The reference is build/docs/index.html"
