"""The CUDA kernels without nvcc: CuPy compiles them at first use."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cuda import THREADS

if TYPE_CHECKING:
    from .launch import Kernels


def has_cupy() -> bool:
    """Returns whether CuPy is installed; it is imported when it is first needed."""
    return importlib.util.find_spec("cupy") is not None


def source_folder() -> Path:
    """Returns where the kernels' source is: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def kernel_source() -> str:
    """Returns csrc/cuda/kernels.cuh with everything it includes, as one text: NVRTC then needs no folders."""
    seen: set[Path] = set()

    def inline(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        lines = []
        for line in path.read_text().splitlines():
            if line.startswith('#include "'):
                lines.append(inline((path.parent / line.split('"')[1]).resolve()))
            elif line != "#pragma once":
                lines.append(line)
        return "\n".join(lines)

    return inline((source_folder() / "cuda" / "kernels.cuh").resolve())


NVRTC_OPTIONS = ("-std=c++17", "--fmad=false")


class _CurrentStream:
    """Torch's current stream, as CUDA's protocol for Python hands streams around."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@cache
def cupy_kernels() -> Kernels:
    """Returns the kernels compiled by CuPy, on torch's current stream. CuPy keeps the machine code in ~/.cupy.

    Raises:
        RuntimeError: CuPy or its NVRTC does not work here.
    """
    try:
        import cupy
        import numpy

        module: Any = cupy.RawModule(code=kernel_source(), options=NVRTC_OPTIONS, backend="nvrtc")
        module.compile()
    except Exception as error:
        raise RuntimeError(
            f"dgc: CuPy could not compile the CUDA kernels: {error}. Install a CuPy that fits the driver "
            "(pip install '.[cupy]' for CUDA 13), or uninstall it: plain PyTorch then runs, slower"
        ) from error

    from .launch import Kernels  # its structs take a while to make, and few need them

    def launch(name: str, x: int, y: int, args: ctypes.Structure) -> None:
        # CuPy passes an array of one element by value.
        by_value = numpy.frombuffer(bytes(args), dtype=numpy.dtype((numpy.void, ctypes.sizeof(args))))
        with cupy.cuda.Stream.from_external(_CurrentStream()):
            module.get_function(name)((x, y), (THREADS,), (by_value,))

    return Kernels(launch)


def _on_device(op: str) -> Callable[..., None]:
    """Returns an op for the dispatcher: current device is the tensors', kernels are compiled by then."""

    def run(*args: Any) -> None:
        flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
        # Some tensor is there, or the dispatcher would not have come here; the checks are for the others.
        device = next(x.device for x in flat if isinstance(x, Tensor) and x.is_cuda)
        with torch.cuda.device(device):
            getattr(cupy_kernels(), op)(*args)

    return run


def register_cupy(library: torch.library.Library, ops: Iterable[str]) -> None:
    """Makes CuPy's kernels the implementation of these ops for CUDA tensors."""
    for op in ops:
        library.impl(op, _on_device(op), "CUDA")
