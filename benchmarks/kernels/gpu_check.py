"""Everything that only a GPU can confirm, in eight minutes: build, tests, compute-sanitizer, benchmark.

    ./launch/gpu_check.sh

Runs every step whatever happens to the others, and writes results/gpu_check.md and .json; the exit status says whether
one failed. What cannot run on this machine is listed as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "setuptools", "pytest", "pytest_timeout", "tabulate", "tqdm")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass
class Step:
    """How one step ended."""

    name: str
    result: str
    seconds: float = 0.0
    says: str = ""
    log: list[str] = field(default_factory=list)


class Check:
    """Runs steps until the time is up."""

    def __init__(self, minutes: float) -> None:
        """Starts the clock."""
        self.deadline = time.monotonic() + 60 * minutes
        self.steps: list[Step] = []

    def run(self, name: str, command: Sequence[str], seconds: float, folder: Path = ROOT, **environment: str) -> None:
        """Runs a command in a folder, for at most `seconds` and what is left of the whole."""
        begin = time.monotonic()
        limit = min(seconds, self.deadline - begin)
        if limit < 5:
            self.skip(name, "no time left")
            return
        print(f"\n== {name}: {' '.join(command)}")
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
            result = "passed" if process.returncode == 0 else f"FAILED ({process.returncode})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # ranks too, which hold its output open
            output, _ = process.communicate()
            result = f"FAILED (not done after {limit:.0f} s)"
        lines = [line for line in output.splitlines() if line.strip()]
        print("\n".join(lines[-25:]))
        summary = [line for line in lines if re.search(r"\d passed|\d failed|SUMMARY|rror", line)]
        says = summary[-1].strip("= ") if summary else ""
        log = [] if result == "passed" else lines[-80:]
        self.steps.append(Step(name, result, time.monotonic() - begin, says, log))

    def skip(self, name: str, reason: str) -> None:
        """Notes a step that this machine cannot do."""
        print(f"\n== {name}: NOT CHECKED, {reason}")
        self.steps.append(Step(name, f"not checked: {reason}"))

    @property
    def failed(self) -> bool:
        """Whether any step failed."""
        return any(step.result.startswith("FAILED") for step in self.steps)


def without_library(folder: Path) -> None:
    """Copies package and tests without the built library, as it is installed where nothing compiles; CuPy's case."""
    for name in ("dgc", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", folder / "dgc" / "csrc")
    shutil.copy(ROOT / "pyproject.toml", folder)


def main() -> None:
    """Runs the steps and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.8, help="for everything together")
    parser.add_argument("--no-benchmark", action="store_true", help="leave benchmarks.kernels.ops out")
    args = parser.parse_args()
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        sys.exit(f"gpu_check: expected {', '.join(missing)} in {sys.executable}. Set PYTHON to one that has them")
    import torch
    from tabulate import tabulate

    if not torch.cuda.is_available():
        sys.exit(f"gpu_check: expected a GPU that torch {torch.__version__} can use, found none")

    check = Check(args.minutes)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    check.run("build", build, 120, DGC_CUDA="auto" if nvcc else "0")
    if nvcc:
        check.run("ops on the GPU", [*PYTEST, "tests/ops/kernels", "-k", "cuda"], 120)
        check.run("hook, graphs, streams", [*PYTEST, "tests/ops/test_cuda.py", "tests/project/test_cuda_build.py"], 120)
    else:
        check.skip("ops on the GPU", "no nvcc, so no kernels were built")
    if nvcc and not args.no_benchmark:
        check.run("benchmark", [sys.executable, "-m", "benchmarks.kernels.ops", "--device", "cuda"], 170)
    if importlib.util.find_spec("cupy") is not None:
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            without_library(copy)
            tests = [*PYTEST, "tests/ops/kernels", "tests/ops/test_cuda.py", "-k", "cuda"]
            # There, since pytest would find this folder's package first.
            check.run("the same through CuPy", tests, 150, copy, PYTHONPATH=str(copy), DGC_EXPECT="cupy")
    else:
        check.skip("the same through CuPy", "CuPy is not installed")
    some = "cuda and (random_shapes and 13 or many_ranks or restore_gives or subtract or corrupt or random_bytes)"
    for tool in ("memcheck", "racecheck", "synccheck"):
        if nvcc and shutil.which("compute-sanitizer"):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            # Without torch's pool of memory, in which nothing is out of bounds.
            tests = [*command, *PYTEST, "tests/ops/kernels", "-k", some]
            check.run(tool, tests, 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        else:
            check.skip(tool, "compute-sanitizer is not installed")

    # Here, since it imports dgc: the library was not built before.
    from benchmarks.harness import machine, write

    rows = [[step.name, step.result, f"{step.seconds:.0f}", step.says[:100]] for step in check.steps]
    table = tabulate(rows, ["step", "result", "seconds", "its last word"], tablefmt="github")
    about = machine() | {"commit": commit.stdout.strip()}  # as it was before results were written
    described = ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
    text = f"What a GPU has confirmed, by `./launch/gpu_check.sh`:\n\n{table}\n\n{described}\n"
    print("\n" + text)
    write("gpu_check", text, {"machine": about, "steps": [asdict(step) for step in check.steps]})
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
