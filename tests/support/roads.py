"""The roads that an op can take. Tests of the ops run on all of them, with arguments on the CPU.

native     the native library, on the CPU
built      csrc/cuda as setup.py builds it, ops.cpp and launch.cu, on the emulator of tests/emulator
jit        csrc/cuda as CuPy compiles it, launched by dgc/ops/launch.py, on the emulator
cuda       a real GPU, by the road that dgc.backend("cuda") names; arguments travel there and back
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from dgc import ops as dgc_ops
from dgc.ops import cuda
from dgc.ops import launch as kernels
from dgc.ops.library import OPS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@cache
def emulator() -> ctypes.CDLL:
    """Returns csrc/cuda compiled for the CPU; its ops are registered under the dispatch key PrivateUse1."""
    sources = [
        ROOT / "tests/emulator/emulator.cpp",
        ROOT / "tests/emulator/machine.cpp",
        ROOT / "csrc/cuda/ops.cpp",
        ROOT / "csrc/bucket.cpp",
    ]
    # fmt: off
    command = [
        os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE",
        "-Wno-unknown-pragmas", "-DDGC_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{ROOT / 'tests/emulator'}", f"-I{sysconfig.get_paths()['include']}",
        *(f"-I{path}" for path in cpp_extension.include_paths()), *map(str, sources),
        *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu",
    ]
    # fmt: on
    files = [p for folder in ("csrc", "tests/emulator") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    key = hashlib.blake2b(repr(command).encode() + torch.__version__.encode(), digest_size=8)
    for file in files:
        key.update(file.read_bytes())
    library = ROOT / "build" / f"emulator-{key.hexdigest()}.so"
    library.parent.mkdir(exist_ok=True)
    with (ROOT / "build" / "emulator.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several pytest processes builds it, and the others wait
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(library)
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]
    loaded.emulate.restype = ctypes.c_bool
    return loaded


def emulate(name: str, x: int, y: int, args: ctypes.Structure) -> None:
    assert emulator().emulate(name.encode(), x, y, ctypes.addressof(args)), name


def cuda_workspace(segments: Tensor) -> Tensor:
    return cuda.workspace(segments, CPU)


def known(name: str) -> str:
    """Returns the name of an op.

    Raises:
        AttributeError: it is none.
    """
    if name not in OPS:
        raise AttributeError(name)
    return name


class Native:
    """The ops on the CPU."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return getattr(dgc_ops, known(name))

    @staticmethod
    def workspace(segments: Tensor) -> Tensor:
        return dgc_ops.workspace(segments, CPU)


class Built:
    """The registered ops, on the emulator."""

    workspace = staticmethod(cuda_workspace)

    def __init__(self) -> None:
        emulator().emulate_order(3)

    def __getattr__(self, name: str) -> Callable[..., None]:
        op = getattr(torch.ops.dgc, known(name)).default

        def run(*args: Any) -> None:
            if name == "subtract_":
                args = (*args, *(1.0, None)[len(args) - 3 :])
            op._op_dk(torch._C.DispatchKey.PrivateUse1, *args)

        return run


class Jit(kernels.Kernels):
    """Launches from Python, on the emulator."""

    workspace = staticmethod(cuda_workspace)

    def __init__(self) -> None:
        emulator().emulate_order(0)
        super().__init__(emulate)

    def subtract_(
        self,
        parameters: list[Tensor],
        updates: list[Tensor],
        lr: float,
        shrink: float = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        super().subtract_(parameters, updates, lr, shrink, skip)


class Cuda:
    """A real GPU. What the op changed comes back into the arguments."""

    @staticmethod
    def workspace(segments: Tensor) -> Tensor:
        return dgc_ops.workspace(segments, torch.device("cuda", torch.cuda.current_device()))

    def __getattr__(self, name: str) -> Callable[..., None]:
        arguments = [argument.name for argument in getattr(torch.ops.dgc, known(name)).default._schema.arguments]

        def run(*args: Any) -> None:
            there: list[tuple[Tensor, Tensor]] = []

            def move(x: Any, index: int) -> Any:
                if isinstance(x, list):
                    return [move(item, -1) for item in x]
                if not isinstance(x, Tensor) or x.is_cuda or (index >= 0 and arguments[index] == "segments"):
                    return x
                # As it lies in memory, gaps and all.
                whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                there.append((x, whole.cuda().as_strided(x.shape, x.stride(), x.storage_offset())))
                return there[-1][1]

            moved = [move(x, index) for index, x in enumerate(args)]
            getattr(dgc_ops, name)(*moved)
            for here, after in there:
                here.copy_(after)

        return run


ROADS: dict[str, Callable[[], Any]] = {"native": Native, "built": Built, "jit": Jit, "cuda": Cuda}


AVAILABLE = [name for name in ROADS if name != "cuda" or torch.cuda.is_available()]


class Current:
    """The road of the running test: used like dgc.ops."""

    name = "native"
    road: Any = Native()

    def take(self, name: str) -> None:
        self.name, self.road = name, ROADS[name]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.road, name)


ops = Current()
