"""Builds dgc/_native*.so, the kernels: one file against torch's stable ABI, for every torch from 2.10 and every Python.

It takes torch's headers, and imports no torch; build_backend.py says where they are.

DGC_NATIVE=0 leaves it out; so does a machine without a C++ compiler, and the plain PyTorch path, slower, is used.

DGC_CUDA=auto, the default, adds the CUDA kernels where nvcc is found ($CUDA_HOME, $PATH, /usr/local/cuda), whatever
torch it is: the file loads into a torch without CUDA too. DGC_CUDA=1 insists on them, DGC_CUDA=0 leaves them out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import builds_native, compiler, find_torch

# The oldest torch and Python that the library must load in.
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
CPU_SOURCES = ["csrc/bucket.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cpp"))
# Machine code for A100 and H100, and PTX for what comes later.
ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]


def find_nvcc() -> str | None:
    """Returns the nvcc to build with, or None for a build without CUDA.

    Raises:
        SystemExit: DGC_CUDA=1 and there is none, or DGC_CUDA has another value.
    """
    asked = os.environ.get("DGC_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"DGC_CUDA: expected 0, 1 or auto, got {asked!r}")
    if asked == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is not None and asked == "auto" and not knows_architectures(nvcc):
        print(f"dgc: {nvcc} does not know compute capability 9.0 (CUDA 11.8 does): the CUDA kernels are left out")
        return None
    if nvcc is None:
        if asked == "1":
            raise SystemExit(
                "DGC_CUDA=1: expected nvcc in $CUDA_HOME/bin or $PATH, found none. Install the CUDA toolkit"
            )
        print("dgc: no nvcc, no CUDA kernels; CuPy compiles them at first use (pip install '.[cupy]')")
    return nvcc


def knows_architectures(nvcc: str) -> bool:
    """Returns whether nvcc can build what the library holds."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    return {"sm_80", "sm_90"} <= set(listed.stdout.split())


def cuda_runtime(nvcc: str) -> str:
    """Returns the path of nvcc's static runtime, which loads the driver only when it is used."""
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = next((line.split("TOP=")[1] for line in dry.stderr.splitlines() if "TOP=" in line), "")
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = Path(top, folder, "libcudart_static.a")
        if library.exists():
            return str(library)
    raise SystemExit(
        f"dgc: expected libcudart_static.a beside {nvcc}, found none below {top}. DGC_CUDA=0 builds without"
    )


def compile_kernels(nvcc: str, folder: Path) -> str:
    """Compiles the CUDA source, which needs no torch, and returns the object file."""
    folder.mkdir(parents=True, exist_ok=True)
    output = str(folder / "launch.o")
    # No contraction here either, though the kernels say how each operation is rounded.
    command = [nvcc, "-O3", "-std=c++17", "--fmad=false", "-lineinfo", "-Xcompiler=-fPIC", "-ccbin", compiler()]
    command += [f"-gencode={architecture}" for architecture in ARCHITECTURES]
    command += ["-c", "csrc/cuda/launch.cu", "-o", output]
    print(" ".join(command))
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"dgc: {nvcc} failed (it has to know compute capability 9.0). DGC_CUDA=0 builds without CUDA")
    return output


def native_extension() -> dict[str, Any]:
    """Returns setup()'s arguments for the native library; none where it cannot or shall not be built."""
    nvcc = find_nvcc()
    native = builds_native()
    if os.environ.get("DGC_CUDA") == "1" and not native:
        raise SystemExit(
            "DGC_CUDA=1: expected a C++ compiler and no DGC_NATIVE=0; the kernels are part of that library"
        )
    if not native:
        if os.environ.get("DGC_NATIVE") != "0":
            print(f"dgc: no C++ compiler ({compiler()}): installing without the native library; plain PyTorch is used")
        return {}
    torch = find_torch()
    extension = Extension(
        "dgc._native",
        CPU_SOURCES + (CUDA_SOURCES if nvcc else []),
        depends=[str(path) for suffix in ("*.h", "*.cuh", "*.cu") for path in Path("csrc").rglob(suffix)],
        # No contraction: mu*u + h is rounded twice, as torch rounds it, on every device.
        include_dirs=[f"{torch}/include"],
        library_dirs=[f"{torch}/lib"],
        libraries=["torch_cpu"],
        extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", *ABI],
        py_limited_api=True,
        language="c++",
    )

    class Build(build_ext):
        """setuptools' build, with the kernels compiled first."""

        def build_extensions(self) -> None:
            """Compiles the CUDA source where there is nvcc, then everything else.

            Raises:
                SystemExit: there is no torch to build with, which pip sees to unless it is told not to.
            """
            if torch is None:
                raise SystemExit(
                    f"dgc: expected torch 2.10 or later in {sys.executable}, found none. Install it first, or leave "
                    "out --no-build-isolation: pip then brings one to build with. DGC_NATIVE=0 builds without kernels"
                )
            # What was built with another DGC_CUDA is no use, and looks up to date.
            self.force = True
            if nvcc:
                extension.extra_objects = [compile_kernels(nvcc, Path(self.build_temp)), cuda_runtime(nvcc)]
                extension.extra_link_args = ["-ldl", "-lrt", "-lpthread"]
            super().build_extensions()

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native_extension())
