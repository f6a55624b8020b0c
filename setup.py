"""Builds dgc/_native*.so, the kernels: one file against torch's stable ABI, for every torch from 2.10 and every Python.

DGC_NATIVE=0 leaves it out; so does a machine without a C++ compiler, and the plain PyTorch path, slower, is used.
The CUDA sources will join in csrc/cuda.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from setuptools import setup

# The oldest torch and Python that the library must load in.
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))


def native_extension() -> dict[str, Any]:
    """Returns setup()'s arguments for the native library; none where it cannot or shall not be built."""
    if os.environ.get("DGC_NATIVE") == "0":
        return {}
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        print(f"dgc: no C++ compiler ({compiler}): installing without the native library; plain PyTorch will be used")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "dgc._native",
        SOURCES,
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        # No contraction: mu*u + h is rounded twice, as torch rounds it, on every device.
        extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", *ABI],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native_extension())
