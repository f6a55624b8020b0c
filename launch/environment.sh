# Sourced by the scripts beside it: which Python they run, and how an environment is made where there is none. To make
# one takes set -e and a fail() that says what is wrong and ends the script.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${DGC_VENV:-$root/.venv}")

# Prints the Python that the user has chosen: PYTHON, else the activated environment's; nothing where there is neither.
chosen_python() {
    if [[ -n ${PYTHON:-} ]]; then
        echo "$PYTHON"
    elif [[ -n ${VIRTUAL_ENV:-} ]]; then
        echo "$VIRTUAL_ENV/bin/python"
    elif [[ ${CONDA_DEFAULT_ENV:-base} != base ]]; then # many shells are in base without being asked
        echo "$CONDA_PREFIX/bin/python"
    fi
}

# Prints the Python that runs a training script: the chosen one, else that of the environment made here, else python3.
find_python() {
    local chosen
    chosen=$(chosen_python)
    if [[ -z $chosen && -x $venv/bin/python ]]; then chosen=$venv/bin/python; fi
    echo "${chosen:-python3}"
}

# Ends the script unless $1 can make the environment.
check_python() {
    command -v "$1" >/dev/null || fail "$1 not found. Install Python 3.10 or later, or set PYTHON to one"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python: expected 3.10 or later, got $("$1" -V). Set PYTHON to a newer one"
}

# Makes the environment $venv with the Python $1, once: the stamp is what it was made from. A subshell, for the cd.
make_environment() (
    cd "$root"
    stamp=$venv/dgc-quickstart
    source_hash=$(
        {
            echo "$root ${DGC_NATIVE:-1} ${DGC_CUDA:-auto}"
            cat constraints.txt pyproject.toml setup.py build_backend.py
            find csrc -type f -print0 | sort -z | xargs -0 cat
        } | sha256sum
    )
    if [[ -f $stamp && $(<"$stamp") == "$source_hash" ]]; then exit; fi

    if [[ ${DGC_NATIVE:-1} != 0 ]] && ! command -v "${CXX:-g++}" >/dev/null; then
        fail "${CXX:-g++} not found; it compiles the kernels. Install it (apt install g++, dnf install gcc-c++), or set \
DGC_NATIVE=0 to go on with plain PyTorch kernels, slower"
    fi
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$1 lacks the module venv. Install it (apt install python3-venv), or set PYTHON to another Python"
    echo "== Installing into $venv"
    "$1" -m venv "$venv"
    # torch first, and alone under the constraint: whatever follows finds it there and takes no other build.
    "$venv/bin/python" -m pip install -c constraints.txt torch
    echo "== Compiling the kernels"
    "$venv/bin/python" -m pip install --quiet -c constraints.txt -e ".[examples]"
    echo "$source_hash" >"$stamp"
)

# Has the C library (glibc) keep up to 256 MiB of freed memory. On the CPU gradients are allocated and freed at every
# step; given back to the kernel in between, their pages are cleared anew each time, some 7 % of a step.
keep_freed_memory() {
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-268435456}
    # The highest that glibc allows. Once the other one is set, it does not find this one by itself any more.
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}
}
