"""What only the GPU benchmark compares with: kernels of rivals.cu, and what PyTorch users run today."""

from __future__ import annotations

import ctypes
import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _orthogonalize
from torch.utils import cpp_extension
from tqdm import tqdm

from .steps import ADAM, MU, Step

DEVICE = torch.device("cuda")
POWERSGD_RANK = 4

Shape = tuple[int, int]


class Library:
    """The functions of rivals.cu, compiled for this GPU."""

    def __init__(self) -> None:
        nvcc, source = f"{cpp_extension.CUDA_HOME}/bin/nvcc", Path(__file__).with_name("rivals.cu")
        if not Path(nvcc).exists():
            raise SystemExit(f"ops_cuda.py: expected nvcc in $CUDA_HOME/bin or in $PATH for {source.name}, found none")
        output = Path(tempfile.mkdtemp()) / "rivals.so"
        architecture = "-arch=sm_{}{}".format(*torch.cuda.get_device_capability())
        # No contraction: the same u and v as ours, to the bit.
        flags = ["-O3", "-std=c++17", "--fmad=false", architecture, "-shared", "-Xcompiler=-fPIC"]
        for options in (["-DTOPK", *cccl_headers()], []):
            self.has_topk = bool(options)
            if subprocess.run([nvcc, *flags, *options, str(source), "-o", str(output)], check=False).returncode == 0:
                break
            if options:
                loud("cub topk is LEFT OUT: see nvcc's error. pip install 'nvidia-cuda-cccl>=13.2.86' brings headers")
        else:
            raise SystemExit(f"ops_cuda.py: {nvcc} could not compile {source.name}")
        loaded = ctypes.CDLL(str(output))
        pointer, int64 = ctypes.c_void_p, ctypes.c_int64
        self._update = loaded.update
        self._update.argtypes = [pointer, pointer, pointer, int64, ctypes.c_float, pointer]
        self._update_adam = loaded.update_adam
        self._update_adam.argtypes = [*4 * [pointer], int64, *6 * [ctypes.c_float], pointer]
        if self.has_topk:
            self._topk = loaded.topk
            self._topk.argtypes = [*4 * [pointer], int64, ctypes.c_float, int64, *4 * [pointer]]

    def update(self, g: Tensor, u: Tensor, v: Tensor) -> None:
        """Updates u and v."""
        succeed(self._update(g.data_ptr(), u.data_ptr(), v.data_ptr(), g.numel(), MU, current_stream()))

    def update_adam(self, g: Tensor, m: Tensor, s: Tensor, v: Tensor) -> None:
        """Updates m, s and v."""
        numbers = [value for name, value in ADAM.items() if name != "c2"]
        pointers = (x.data_ptr() for x in (g, m, s, v))
        succeed(self._update_adam(*pointers, g.numel(), *numbers, current_stream()))

    def topk(
        self, g: Tensor, u: Tensor, v: Tensor, keys: Tensor | None, k: int, out: Tensor, scratch: Tensor | None
    ) -> int:
        """Updates u and v and takes out the k largest |v|, where there is scratch.

        Returns:
            The bytes of scratch that it needs.
        """
        nbytes = ctypes.c_size_t(0 if scratch is None else scratch.numel())
        size = ctypes.cast(ctypes.pointer(nbytes), ctypes.c_void_p)
        succeed(
            self._topk(
                address(g),
                address(u),
                address(v),
                address(keys),
                g.numel(),
                MU,
                k,
                address(out),
                address(scratch),
                size,
                current_stream(),
            )
        )
        return nbytes.value


def cccl_headers() -> list[str]:
    """Returns nvcc's option for the headers of PyPI's nvidia-cuda-cccl; none where it is missing or too old.

    nvcc then takes its own, which are new enough from CUDA 13.2 on.
    """
    try:
        files = importlib.metadata.files("nvidia-cuda-cccl") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [f"-I{Path(str(f.locate())).parents[2]}" for f in files if f.match("cub/device/device_topk.cuh")]


def address(tensor: Tensor | None) -> int | None:
    """Returns where a tensor's memory begins; none of no tensor."""
    return None if tensor is None else tensor.data_ptr()


def current_stream() -> int:
    """Returns torch's current stream, a cudaStream_t."""
    return torch.cuda.current_stream().cuda_stream


def succeed(code: int) -> None:
    """Raises RuntimeError where a cudaError_t is one."""
    if code != 0:
        raise RuntimeError(f"CUDA error {code} in rivals.cu")


def loud(line: str) -> None:
    """Prints a line that nobody overlooks."""
    tqdm.write(f"\n*** {line} ***\n", file=sys.stderr)


class CubTopK(Step):
    """Update, cub::DeviceTopK, gather and zero."""

    def __init__(
        self, gradients: list[Tensor], u: Tensor, v: Tensor, k: int, library: Library, *, lazy: bool = False
    ) -> None:
        super().__init__(gradients, u, v, k)
        self.library = library
        self.keys = None if lazy else torch.empty_like(v)
        self.out = torch.empty(4 * k, device=DEVICE)
        nbytes = library.topk(gradients[0], u, v, self.keys, k, self.out, None)
        self.scratch = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)

    def __call__(self) -> None:
        self.library.topk(self.next(), self.u, self.v, self.keys, self.k, self.out, self.scratch)


class Sampled(Step):
    """The threshold of a strided 1 % sample, refined until about k entries reach it."""

    def __call__(self) -> None:
        self.u.mul_(MU).add_(self.next())
        self.v.add_(self.u)
        size = self.v.abs()
        threshold = size[self.at % 100 :: 100].topk(max(1, self.k // 100), sorted=False).values.min()
        indices = (size >= threshold).nonzero().view(-1)
        for _ in range(10):
            if 0.8 * self.k <= len(indices) <= 1.3 * self.k:
                break
            threshold *= 1.3 if len(indices) > self.k else 0.7
            indices = (size >= threshold).nonzero().view(-1)
        self.values = self.v[indices]
        self.v.index_fill_(0, indices, 0)
        self.u.index_fill_(0, indices, 0)


class PowerSGD(Step):
    """P = M Q, made orthogonal, and Q = M^T P, where M is the gradient and what P Q^T missed of the one before."""

    def __init__(self, gradients: list[Tensor], approximation: Tensor, shapes: Sequence[Shape]) -> None:
        nothing = torch.empty(0)
        super().__init__(gradients, nothing, nothing, 0)
        self.error, self.m, self.approximation = torch.zeros_like(approximation), approximation.clone(), approximation
        qs = [torch.randn(1, columns, POWERSGD_RANK, device=DEVICE) for _, columns in shapes]
        self.views = list(zip(matrices(self.m, shapes), matrices(approximation, shapes), qs, strict=True))

    def __call__(self) -> None:
        torch.add(self.next(), self.error, out=self.m)
        for m, approximation, q in self.views:
            p = torch.bmm(m, q)
            _orthogonalize(p)
            torch.bmm(m.mT, p, out=q)
            torch.bmm(p, q.mT, out=approximation)
        torch.sub(self.m, self.approximation, out=self.error)


def matrices(bucket: Tensor, shapes: Sequence[Shape]) -> Iterator[Tensor]:
    """Yields a bucket's layers as the hook sees them: batches of one matrix."""
    offset = 0
    for rows, columns in shapes:
        yield bucket[offset : offset + rows * columns].view(1, rows, columns)
        offset += rows * columns
