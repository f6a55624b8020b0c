"""Races in the CUDA kernels: no thread writes what another of its block touches without a barrier in between."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "emulator"


@pytest.fixture(scope="module")
def races(tmp_path_factory) -> Path:
    """Builds the kernels with ThreadSanitizer, and the fibers that run them without."""
    folder = tmp_path_factory.mktemp("races")
    compiler, include = os.environ.get("CXX", "g++").split()[0], f"-I{FOLDER}"
    common = [compiler, "-std=c++17", "-ffp-contract=off", "-Wno-unknown-pragmas", include]
    sanitize = "-fsanitize=thread"
    probe = subprocess.run([compiler, sanitize, "-x", "c++", "-", "-o", os.devnull], input="int main() {}", text=True)
    if probe.returncode != 0:
        pytest.skip(f"NOT CHECKED: {compiler} has no ThreadSanitizer")
    kernels, machine, program = folder / "kernels.o", folder / "machine.o", folder / "races"
    for command in (
        [*common, "-O1", "-g", sanitize, "-c", str(FOLDER / "races.cpp"), "-o", str(kernels)],
        [*common, "-O2", "-DEMULATE_RACES", "-c", str(FOLDER / "machine.cpp"), "-o", str(machine)],
        [compiler, sanitize, str(kernels), str(machine), "-o", str(program)],
    ):
        subprocess.run(command, check=True)
    return program


def run(program: Path, *what: str) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer does not get along with addresses as random as some kernels make them.
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*fixed_addresses, str(program), *what], capture_output=True, text=True)


def test_no_kernel_races(races):
    result = run(races)
    assert result.returncode == 0, result.stderr[:5000]
    assert result.stdout == "done\n"


@pytest.mark.parametrize("what", ["barrier", "vote"])
def test_a_missing_barrier_is_seen(races, what):
    result = run(races, what)
    assert result.returncode == 66
    assert "data race" in result.stderr
    assert "neighbour" in result.stderr
