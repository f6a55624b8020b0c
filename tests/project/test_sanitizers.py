"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, fed by tests/ops/kernels and tests/ops/fuzz.

The tests run in a process of their own, on a copy of the package beside a library that is made of setup.py's sources
and flags, and the sanitizers.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dgc

# The longest test takes 30 seconds of CPU time, 13 of them to compile. The limit is there to end what hangs, and not to
# measure how busy the machine is, so it is forty times that.
pytestmark = pytest.mark.timeout(1200)

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
COMPILER = os.environ.get("CXX", "g++").split()[-1]
# -O1 comes last and wins: -O3 would take minutes to compile.
FLAGS = ["-O1", "-w", "-fPIC", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=all"]

# What setup.py builds, without building it.
DESCRIBE = """
import json, runpy
from unittest import mock
with mock.patch("setuptools.setup") as setup:
    runpy.run_path("setup.py")
names = "sources", "include_dirs", "library_dirs", "libraries", "extra_compile_args"
print(json.dumps({name: getattr(setup.call_args.kwargs["ext_modules"][0], name) for name in names}))
"""
RUN_TESTS = """
import sys, pytest, torch
import dgc  # the copy beside, before pytest puts the checkout in front
code = pytest.main(sys.argv[1:])
print("loaded:", *torch.ops.loaded_libraries)
sys.exit(code)
"""
PLANTED = """
extern "C" void write(float* x, long i) { x[i] = 1.0f; }
extern "C" long shift(float*, long n) { return 1L << n; }
"""
RUN_PLANTED = """
import ctypes, sys, torch
library, name, *arguments = sys.argv[1:]
x = torch.zeros(1000)
for argument in arguments:
    getattr(ctypes.CDLL(library), name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(int(argument)))
    print("survived", argument, flush=True)
"""


@pytest.fixture(scope="module")
def runtimes() -> str:
    """Returns what LD_PRELOAD takes, since Python itself is not built with the sanitizers."""
    probe = [COMPILER, *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    known = subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode == 0
    # libstdc++ too, or AddressSanitizer has nobody to pass an exception on to.
    names = ["libasan.so", "libubsan.so", "libstdc++.so.6"]
    paths = [subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip() for name in names]
    if not known or not all(Path(path).is_absolute() for path in paths):
        pytest.skip(f"NOT CHECKED: {COMPILER} has no AddressSanitizer and UndefinedBehaviorSanitizer to preload")
    return " ".join(paths)


@pytest.fixture(scope="module")
def library(runtimes, tmp_path_factory) -> Path:
    """Builds the library with the sanitizers, anew where a source or a flag changed."""
    environment = {**os.environ, "DGC_CUDA": "0", "DGC_NATIVE": "1"}
    described = subprocess.check_output([sys.executable, "-c", DESCRIBE], env=environment, cwd=ROOT, text=True)
    extension = json.loads(described.splitlines()[-1])
    includes = [f"-I{path}" for path in extension["include_dirs"]]
    compile_ = [COMPILER, *includes, *extension["extra_compile_args"], *FLAGS]
    link = [COMPILER, "-shared", *FLAGS, *(f"-L{path}" for path in extension["library_dirs"])]
    link += [f"-l{name}" for name in extension["libraries"]]

    version = subprocess.check_output([COMPILER, "--version"], text=True)
    key = hashlib.blake2b(repr((compile_, link, version, torch.__version__)).encode(), digest_size=8)
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp") and "cuda" not in path.parts:
            key.update(path.read_bytes())
    built = ROOT / "build" / f"sanitized-{key.hexdigest()}.so"
    if not built.exists():
        folder = tmp_path_factory.mktemp("objects")
        objects = [str(folder / f"{i}.o") for i in range(len(extension["sources"]))]

        def compile_one(source: str, to: str) -> None:
            subprocess.run([*compile_, "-c", source, "-o", to], cwd=ROOT, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, extension["sources"], objects))
        built.parent.mkdir(exist_ok=True)
        partial = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*link, *objects, "-o", str(partial)], check=True)
        partial.rename(built)
    return built


def run(runtimes: str, folder: Path, *arguments: str, cpu: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS)]),
        "LD_PRELOAD": runtimes,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DGC_CPU": cpu,
        # Two threads that do not spin while they wait: elsewhere other tests may be running.
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


# Elsewhere tests/ops/kernels tries everything. What is left out here would reach no more lines or branches of csrc
# (gcov).
CHOSEN = "native and not (hard_data and (0.02 or 0.3) or for_every_type and (0.25 or 0.01) or random_shapes and 1)"
# Without AVX2, update, scan and subtract differ, and nothing that reads other ranks' bytes.
PORTABLE = "native and (for_every_type and 0.001 or non_finite or overflow and not hard_data or subtract_gives)"


@pytest.mark.parametrize(
    ("cpu", "folders", "chosen", "at_least"),
    [("", ["ops/kernels", "ops/fuzz"], CHOSEN, 150), ("portable", ["ops/kernels"], PORTABLE, 35)],
    ids=["avx2", "portable"],
)
def test_no_bad_access_and_no_undefined_behaviour(runtimes, library, tmp_path, cpu, folders, chosen, at_least):
    shutil.copytree(Path(dgc.__file__).parent, tmp_path / "dgc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    sanitized = tmp_path / "dgc/_native.sanitized.so"
    shutil.copy(library, sanitized)
    tests = [str(TESTS / name) for name in folders]
    result = run(runtimes, tmp_path, RUN_TESTS, "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *tests, cpu=cpu)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    assert f"loaded: {sanitized}\n" in result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= at_least, result.stdout
    assert "skipped" not in result.stdout


@pytest.fixture(scope="module")
def planted(runtimes, tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("planted") / "planted.so"
    command = [COMPILER, "-shared", *FLAGS, "-x", "c++", "-", "-o", str(built)]
    subprocess.run(command, input=PLANTED, text=True, check=True)
    return built


@pytest.mark.parametrize(
    ("name", "sound", "fault", "report"),
    [
        ("write", 999, 1000, "AddressSanitizer: heap-buffer-overflow"),
        ("shift", 62, 64, "runtime error: shift exponent 64 is too large"),
    ],
)
def test_a_planted_fault_is_seen_and_nothing_else(runtimes, planted, tmp_path, name, sound, fault, report):
    result = run(runtimes, tmp_path, RUN_PLANTED, str(planted), name, str(sound), str(fault))
    assert result.returncode != 0
    assert result.stdout == f"survived {sound}\n", result.stderr[:3000]
    assert report in result.stderr
