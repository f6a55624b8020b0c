"""The road through CuPy as far as it goes without a GPU: a stand-in for CuPy launches on the emulator."""

import contextlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dgc
from dgc.ops import cupy as jit
from dgc.ops import reference
from support.buckets import equal, make
from support.roads import emulator, ops

compiled = []


class RawModule:
    """What dgc uses of cupy.RawModule."""

    def __init__(self, code, options, backend):
        assert "dgc_update" in code
        assert backend == "nvrtc"
        compiled.append(options)

    def compile(self):
        if compiled[-1] is None:
            raise OSError("no NVRTC")

    def get_function(self, name):
        def launch(grid, block, args):
            [by_value] = args
            assert by_value.size == 1  # CuPy refuses others
            assert block == (256,)
            assert emulator().emulate(name.encode(), *grid, by_value.ctypes.data)

        return launch


@pytest.fixture
def cupy(monkeypatch):
    stand_in = types.SimpleNamespace(
        RawModule=RawModule,
        cuda=types.SimpleNamespace(Stream=types.SimpleNamespace(from_external=lambda _: contextlib.nullcontext())),
    )
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    jit.cupy_kernels.cache_clear()
    yield
    jit.cupy_kernels.cache_clear()


def test_kernels_are_compiled_once_and_launched_with_their_structs(cupy):
    ops.take("jit")
    compiled.clear()
    try:
        args = make([70_000, 300], 0.01, torch.bfloat16, torch.float16)
        expected = args.clone()
        reference.compress_(*expected.list())
        jit.cupy_kernels().compress_(*args.list())
        assert jit.cupy_kernels() is jit.cupy_kernels()
    finally:
        ops.take("native")
    assert compiled == [jit.NVRTC_OPTIONS]
    equal(args, expected)


def test_a_cupy_that_cannot_compile_says_what_to_do(cupy, monkeypatch):
    monkeypatch.setattr(jit, "NVRTC_OPTIONS", None)
    with pytest.raises(RuntimeError, match=r"CuPy could not compile the CUDA kernels: no NVRTC\. Install .*cupy"):
        jit.cupy_kernels()


SCRIPT = """
import torch
import dgc
print(dgc.backend("cuda"), torch._C._dispatch_has_kernel_for_dispatch_key("dgc::compress_", "CUDA"))
"""


def choice(folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(jit.has_cupy(), reason="CuPy itself is installed: launch/gpu_check.sh tests that")
def test_cupy_is_chosen_where_no_kernels_were_built(tmp_path):
    shutil.copytree(Path(dgc.__file__).parent, tmp_path / "dgc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    assert choice(tmp_path).split() == ["reference", "False"]
    (tmp_path / "cupy.py").touch()
    assert choice(tmp_path).split() == ["cupy", "True"]
