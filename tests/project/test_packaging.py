"""What is packed, what the build takes to build with, and what the scripts and pages around a release say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import dgc

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
# Takes site-packages out of sys.path and leaves setuptools, as pip's build isolation does.
ISOLATE = """
import site, sys
import setuptools
outside = {*site.getsitepackages(), %r}
sys.path[:] = [path for path in sys.path if path not in outside]
"""
ASK = "import build_backend; print(build_backend.find_torch(), build_backend.torch_if_missing())"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script at the root of the checkout."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_sdist_has_what_the_build_takes_and_nothing_of_tests_and_benchmarks(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("NOT CHECKED: no git checkout, so the list of the sdist was compared with nothing")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DGC_CUDA": "0"}, check=True, capture_output=True)
    packed = (tmp_path / "torch_dgc.egg-info/SOURCES.txt").read_text().splitlines()
    single = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "build_backend.py", "pyproject.toml", "setup.py"}
    folders = [name for name in listed.stdout.splitlines() if name.startswith(("dgc/", "csrc/"))]
    assert {name for name in packed if ".egg-info/" not in name} == single | set(folders)


def test_the_torch_that_isolation_hides_is_the_one_to_build_with():
    direct = run(ASK)
    assert direct.stdout.split() == [str(TORCH), "[]"], direct.stderr
    isolated = run(ISOLATE % str(TORCH.parent) + "import importlib.util as u; print(u.find_spec('torch'))\n" + ASK)
    assert isolated.stdout.split() == ["None", str(TORCH), "[]"], isolated.stderr


def test_pip_brings_torch_only_where_there_is_none():
    hide = "import build_backend; build_backend.find_torch = lambda: None; from build_backend import torch_if_missing\n"
    hide += "print(torch_if_missing())"
    assert run(hide).stdout == "['torch>=2.10']\n"
    assert run(hide, DGC_NATIVE="0").stdout == "[]\n"
    assert run(hide, CXX="no-such-compiler").stdout == "[]\n"


@pytest.mark.parametrize(
    ("version", "recent"), [("2.9.1", False), ("2.10.0", True), ("2.15.0a0+git", True), ("3.0", True)]
)
def test_a_torch_that_is_too_old_is_none(tmp_path, version, recent):
    (tmp_path / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n")
    script = "import sys, pathlib, build_backend; print(build_backend.is_recent(pathlib.Path(sys.argv[1])))"
    assert run(script, str(tmp_path)).stdout == f"{recent}\n"
    assert run(script, str(tmp_path / "nowhere")).stdout == "False\n"


def test_a_build_without_torch_says_in_one_line_what_to_do(tmp_path):
    script = "import runpy, build_backend; build_backend.find_torch = lambda: None; runpy.run_path('setup.py')"
    options = ["-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    result = run(script, *options, DGC_CUDA="0", DGC_NATIVE="1")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"dgc: expected torch 2.10 or later in {sys.executable}, found none. Install it first, or leave out "
        "--no-build-isolation: pip then brings one to build with. DGC_NATIVE=0 builds without kernels"
    ]


def test_the_library_has_no_symbol_of_python_and_none_of_torch_but_the_stable_ones():
    library = next(Path(dgc.__file__).parent.glob("_native*.so"), None)
    if library is None:
        pytest.skip("NOT CHECKED: the native library was not built")
    assert library.name == "_native.abi3.so"
    table = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    # Those of the C and C++ libraries carry a version.
    symbols = {line.split()[-1] for line in table.splitlines() if "@" not in line and " U " in line}
    foreign = {name for name in symbols if not name.startswith(("aoti_torch_", "torch_"))}
    assert {name for name in foreign if re.search(r"^_?Py|c10|2at|5torch", name)} == set()
    assert len(symbols) > 20


def test_the_scripts_and_the_workflow_know_each_other():
    for script in ("wheel.sh", "test.sh"):
        path = ROOT / "launch" / script
        assert os.access(path, os.X_OK)
        shown = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
        assert f"./launch/{script} [" in shown
    refused = subprocess.run([ROOT / "launch/wheel.sh", "2.13.0"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr == "wheel.sh: expected no arguments, got 2.13.0; --help lists the settings\n"

    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step] == ["./launch/test.sh"]
    assert [step["run"] for step in jobs["wheel"]["steps"] if "run" in step] == ["./launch/wheel.sh"]


def test_every_extra_of_a_user_is_told_of():
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.M)) - {"test"}
    assert extras >= {"examples", "cupy", "lightning", "accelerate", "transformers", "ray"}
    pages = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert {extra for extra in extras if f"'.[{extra}]'" not in pages} == set()
