"""The CUDA source compiles everywhere that it has to, without a GPU: nvcc, NVRTC, and into the library."""

import ctypes
import ctypes.util
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgc
from dgc.ops import cuda
from dgc.ops import cupy as jit
from dgc.ops.library import OPS

ROOT = Path(__file__).parents[2]
# Where setup.py looks, in its order.
PLACES = [f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ["PATH"], "/usr/local/cuda/bin"]
NVCC = next((found for path in PLACES if (found := shutil.which("nvcc", path=path))), None)
KERNELS = {
    f"dgc_{name}"
    for name in (
        "update",
        "bound",
        "collect",
        "digit",
        "last",
        "place",
        "emit",
        "check",
        "average",
        "restore",
        "subtract",
        "scale",
        "encode",
        "decode",
    )
}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="NOT CHECKED: no nvcc, so the CUDA kernels were not compiled")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_every_kernel_without_spills(architecture, tmp_path):
    command = [NVCC, "-O3", "-std=c++17", "--fmad=false", "-Xptxas", "-v", f"-arch={architecture}"]
    command += ["-cubin", str(ROOT / "csrc/cuda/launch.cu"), "-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    reports = re.findall(
        r"properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        result.stderr,
    )
    assert {name: sizes for name, *sizes in reports} == {name: ["0", "0", "0"] for name in KERNELS}


def nvrtc() -> ctypes.CDLL:
    """Returns NVIDIA's runtime compiler: that of the test extra's wheel, or the system's."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    wheels = [str(path) for folder in folders for path in Path(folder).rglob("libnvrtc.so.*")]
    library = wheels[0] if wheels else ctypes.util.find_library("nvrtc")
    if library is None:
        pytest.skip("NOT CHECKED: no NVRTC, so the source that CuPy compiles was not compiled")
    return ctypes.CDLL(library)


@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_nvrtc_compiles_the_source_that_cupy_gets_and_flushes_nothing(architecture):
    library = nvrtc()
    program = ctypes.c_void_p()
    source = jit.kernel_source().encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"dgc.cu", 0, None, None) == 0
    options = [option.encode() for option in (*jit.NVRTC_OPTIONS, f"--gpu-architecture={architecture}")]
    options.append(b"-ftz=true")  # CuPy adds it behind everything
    code = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    # Denormal numbers stay what they are all the same: nothing flushes but 1 / ranks.
    flushing = set(re.findall(r"\b[a-z.]+\.ftz\.[a-z0-9.]+", ptx.value.decode()))
    assert flushing <= {"rcp.rn.ftz.f32", "div.rn.ftz.f32"}
    assert set(re.findall(r"\.entry (\w+)\(", ptx.value.decode())) == KERNELS


def test_the_source_for_cupy_needs_no_other_file():
    source = jit.kernel_source()
    assert '#include "' not in source
    assert "#pragma once" not in source
    assert source.count("struct WireLayout {") == 1


@needs_nvcc
@pytest.mark.skipif(os.environ.get("DGC_CUDA") == "0", reason="NOT CHECKED: built with DGC_CUDA=0")
def test_the_library_has_the_cuda_ops_and_needs_no_cuda_to_load():
    # That the CPU ops of this very file work is what all other tests say.
    assert dgc.backend("cuda") == "native"
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dgc::{op}", "CUDA")
    library = next(Path(dgc.__file__).parent.glob("_native*.so"))
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert not re.search(r"NEEDED.*(libtorch_cuda|libcudart|libcuda\.|libc10_cuda)", needed)


def test_a_wrong_choice_is_an_error():
    environment = {**os.environ, "DGC_CUDA": "yes"}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "DGC_CUDA: expected 0, 1 or auto, got 'yes'" in result.stderr


def test_cuda_without_nvcc_is_an_error_where_it_was_asked_for(tmp_path):
    # A PATH with Python and a compiler, and nothing else.
    for tool in ("python3", os.environ.get("CXX", "g++").split()[0]):
        (tmp_path / Path(tool).name).symlink_to(shutil.which(tool))
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("NOT CHECKED: nvcc is in /usr/local/cuda, where setup.py looks last")
    environment = {**os.environ, "DGC_CUDA": "1", "PATH": str(tmp_path)}
    environment.pop("CUDA_HOME", None)
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "DGC_CUDA=1: expected nvcc" in result.stderr


@pytest.mark.parametrize(("backend", "needed"), [("native", "8.0"), ("cupy", "7.5")])
def test_a_device_that_is_too_old_is_named_with_the_way_out(monkeypatch, backend, needed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    with pytest.raises(RuntimeError, match=rf"expected compute capability {needed} or later .* got 6\.1 \(Tesla P40\)"):
        cuda.check_capability(torch.device("cuda", 0), backend)
