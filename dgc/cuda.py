"""CUDA from Python: the workspace of the kernels, and the road without nvcc, where CuPy compiles them at first use.

The kernels are csrc/cuda. Where setup.py found nvcc they are in the native library, csrc/cuda/ops.cpp fills their
arguments and csrc/cuda/launch.cu queues them. Where not, this file does both: the structs are those of
csrc/cuda/args.h, the launch sequences those of launch.cu.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .wire import GROUP, TILE, align_up, div_up, wire_layout

THREADS = 256
CHUNK = 8192
CHUNKS_PER_TILE = TILE // CHUNK
BINS = 2048
MAX_SOURCES = 256
MAX_PAIRS = 120
FLOAT_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIN_CAPABILITY = {"native": (8, 0), "cupy": (7, 5)}
"""Compute capability that the kernels need: what the library holds code for, what CUDA 13's NVRTC knows."""


def _workspace_sizes(n_segments: int, n_tiles: int, n_entries: int) -> list[int]:
    """Returns the bytes of each part of a workspace, padded: csrc/cuda/args.h is its twin."""
    capacity = 2 * n_entries
    sizes = [
        64 * n_segments,  # the segment table
        4 * n_tiles,  # the segment of each tile
        16,  # the bucket's state
        40 * n_segments,  # states
        16 * n_tiles,  # counts
        24 * n_tiles * CHUNKS_PER_TILE,  # candidates of each chunk
        4 * n_segments * BINS,  # histograms
        4 * n_tiles * (TILE // GROUP),  # group maxima
        4 * capacity,  # candidates
        2 * capacity,  # and their indices
    ]
    return [align_up(size) for size in sizes]


def workspace(segments: Tensor, device: torch.device) -> Tensor:
    """Returns the device's tables of a bucket and the scratch of its kernels: uint8.

    Made once a layout, and then the kernels' alone: they count on finding it as they left it.

    Args:
        segments: int64 [segments, 5] on the CPU, rows as in wire.SEGMENT_COLUMNS.
        device: of the gradients.
    """
    tiles, entries = (segments[:, 3] + TILE - 1) // TILE, segments[:, 4]
    starts = torch.stack([tiles.cumsum(0) - tiles, tiles, entries.cumsum(0) - entries], dim=1)
    tables = (
        torch.cat([segments, starts], dim=1),
        torch.repeat_interleave(torch.arange(len(segments), dtype=torch.int32), tiles),
    )
    sizes = _workspace_sizes(len(segments), len(tables[1]), int(entries.sum()))
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    for table, begin in zip(tables, (0, sizes[0]), strict=True):
        buffer[begin : begin + table.nbytes].copy_(table.view(-1).view(torch.uint8))
    return buffer


def check_capability(device: torch.device, backend: str) -> None:
    """Checks that the kernels can run on a device.

    Raises:
        RuntimeError: the device is older than they need.
    """
    found, needed = torch.cuda.get_device_capability(device), MIN_CAPABILITY[backend]
    if found < needed:
        way_out = "build without them, DGC_CUDA=0 pip install --no-build-isolation ." if backend == "native" else ""
        raise RuntimeError(
            f"dgc: expected compute capability {needed[0]}.{needed[1]} or later for the {backend} CUDA kernels, got "
            f"{found[0]}.{found[1]} ({torch.cuda.get_device_name(device)}): "
            f"{way_out or 'uninstall CuPy'}, and the next choice runs: CuPy from 7.5 on, else plain PyTorch"
        )


def has_cupy() -> bool:
    """Returns whether CuPy is installed; it is imported when it is first needed."""
    return importlib.util.find_spec("cupy") is not None


class _Sources(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p * MAX_SOURCES), ("type", ctypes.c_uint8 * MAX_SOURCES))


class _BucketArgs(ctypes.Structure):
    _fields_ = (
        ("segments", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("wire_type", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class _CompressArgs(ctypes.Structure):
    _fields_ = (
        ("bucket", _BucketArgs),
        ("momentum", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("mu", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("payload", ctypes.c_void_p),
        ("sent_momentum", ctypes.c_void_p),
        ("nesterov", ctypes.c_int64),
        ("gradients", _Sources),
    )


class _UnpackArgs(ctypes.Structure):
    _fields_ = (
        ("bucket", _BucketArgs),
        ("payloads", ctypes.c_void_p),
        ("ranks", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("out", _Sources),
    )


class _RestoreArgs(ctypes.Structure):
    _fields_ = (
        ("bucket", _BucketArgs),
        ("payload", ctypes.c_void_p),
        ("which", ctypes.c_void_p),
        ("sent_momentum", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
    )


class _Pair(ctypes.Structure):
    _fields_ = (
        ("parameter", ctypes.c_void_p),
        ("update", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("first_block", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class _SubtractArgs(ctypes.Structure):
    _fields_ = (
        ("skip", ctypes.c_void_p),
        ("minus_lr", ctypes.c_float),
        ("count", ctypes.c_int32),
        ("pairs", _Pair * MAX_PAIRS),
    )


Launch = Callable[[str, int, int, ctypes.Structure], None]
"""Queues a kernel: its name, blocks in x and y, and its argument."""


class Kernels:
    """The ops as sequences of launches. Signatures and meaning are those of dgc/ops.py."""

    def __init__(self, launch: Launch) -> None:
        """Takes what queues a kernel on the current stream of the current device."""
        self.launch = launch

    def compress_(
        self,
        gradients: list[Tensor],
        momentum: Tensor | None,
        residual: Tensor,
        segments: Tensor,
        mu: Tensor,
        scale: Tensor,
        payload: Tensor,
        workspace: Tensor,
        sent_momentum: Tensor | None,
        nesterov: bool,
        wire_dtype: torch.dtype,
    ) -> None:
        """Accumulates, selects and packs: see dgc.ops.compress_."""
        state, _, entries, _ = _layout(segments)
        if sent_momentum is not None and momentum is None:
            raise RuntimeError("sent_momentum: expected None where momentum is None")
        args = _CompressArgs(
            _bucket_args(segments, workspace, wire_dtype),
            _address(momentum, "momentum", torch.float32, state, workspace, aligned=True),
            _address(residual, "residual", torch.float32, state, workspace, aligned=True),
            _address(mu, "mu", torch.float32, len(segments), workspace),
            _address(scale, "scale", torch.float32, 1, workspace),
            _address(
                payload, "payload", torch.uint8, wire_layout(segments, wire_dtype).nbytes, workspace, aligned=True
            ),
            _address(sent_momentum, "sent_momentum", torch.float32, entries, workspace),
            nesterov,
            _sources(gradients, "gradients", segments, workspace),
        )
        tiles = args.bucket.tiles
        self.launch("dgc_update", CHUNKS_PER_TILE * tiles, 1, args)
        for name in ("dgc_bound", "dgc_collect", "dgc_digit", "dgc_last", "dgc_place", "dgc_emit"):
            self.launch(name, tiles, 1, args)

    def unpack(
        self,
        payloads: Tensor,
        rank: int,
        segments: Tensor,
        workspace: Tensor,
        scale: Tensor,
        wire_dtype: torch.dtype,
        out: list[Tensor],
        status: Tensor,
    ) -> None:
        """Checks all payloads, then averages them: see dgc.ops.unpack."""
        _layout(segments)
        nbytes = wire_layout(segments, wire_dtype).nbytes
        if payloads.dim() != 2 or payloads.size(1) != nbytes or not 0 <= rank < payloads.size(0) < 65536:
            raise RuntimeError(
                f"payloads: expected a row of {nbytes} bytes for each rank, this rank's ({rank}) among them, got "
                f"{tuple(payloads.shape)}"
            )
        ranks = payloads.size(0)
        args = _UnpackArgs(
            _bucket_args(segments, workspace, wire_dtype),
            _address(payloads, "payloads", torch.uint8, 0, workspace, aligned=True),
            ranks,
            rank,
            _address(scale, "scale", torch.float32, 1, workspace),
            _address(status, "status", torch.int32, ranks + 1, workspace),
            _sources(out, "out", segments, workspace),
        )
        status.zero_()
        self.launch("dgc_check", div_up(args.bucket.tiles, THREADS // 32), ranks, args)
        self.launch("dgc_average", CHUNKS_PER_TILE * args.bucket.tiles, 1, args)

    def restore_(
        self,
        payload: Tensor,
        which: Tensor,
        segments: Tensor,
        workspace: Tensor,
        sent_momentum: Tensor | None,
        momentum: Tensor | None,
        residual: Tensor,
        wire_dtype: torch.dtype,
    ) -> None:
        """Puts back what was taken out for the chosen parameters: see dgc.ops.restore_."""
        state, _, entries, _ = _layout(segments)
        if sent_momentum is not None and momentum is None:
            raise RuntimeError("sent_momentum: expected None where momentum is None")
        args = _RestoreArgs(
            _bucket_args(segments, workspace, wire_dtype),
            _address(payload, "payload", torch.uint8, wire_layout(segments, wire_dtype).nbytes, workspace),
            _address(which, "which", torch.uint8, len(segments), workspace),
            _address(sent_momentum, "sent_momentum", torch.float32, entries, workspace),
            _address(momentum, "momentum", torch.float32, state, workspace),
            _address(residual, "residual", torch.float32, state, workspace),
        )
        self.launch("dgc_restore", args.bucket.tiles, 1, args)

    def subtract_(self, parameters: list[Tensor], updates: list[Tensor], lr: float, skip: Tensor | None) -> None:
        """Takes lr * update off each parameter: see dgc.ops.subtract_."""
        if len(parameters) != len(updates):
            raise RuntimeError(
                f"updates: expected one for each of {len(parameters)} parameters, got {len(updates)} of them"
            )
        for first in range(0, len(parameters), MAX_PAIRS):
            pairs = list(zip(parameters, updates, strict=True))[first : first + MAX_PAIRS]
            args = _SubtractArgs(_address(skip, "skip", torch.uint8, 1, parameters[0]), -lr, len(pairs))
            blocks = 0
            for i, (p, g) in enumerate(pairs):
                args.pairs[i] = _Pair(
                    _address(p, "parameters", torch.float32, 0, parameters[0]),
                    _address(g, "updates", torch.float32, p.numel(), parameters[0]),
                    p.numel(),
                    blocks,
                )
                blocks += div_up(p.numel(), CHUNK)
            if blocks:
                self.launch("dgc_subtract", blocks, 1, args)


class _Layout(NamedTuple):
    """What a segment table says, worked out once: a table is never changed once it is in use."""

    state: int
    """Elements that momentum and residual have at least."""
    tiles: int
    entries: int
    workspace_bytes: int


_LAYOUTS: MutableMapping[Tensor, _Layout] = WeakIdKeyDictionary()


def _layout(segments: Tensor) -> _Layout:
    """Checks a segment table and returns what it says."""
    known = _LAYOUTS.get(segments)
    if known is None:
        state = _check_segments(segments)
        tiles, entries = int(((segments[:, 3] + TILE - 1) // TILE).sum()), int(segments[:, 4].sum())
        if entries >= 2**32:
            raise RuntimeError(
                f"segments: expected fewer than 2^32 entries a bucket, got {entries}: use smaller buckets"
            )
        known = _Layout(state, tiles, entries, sum(_workspace_sizes(len(segments), tiles, entries)))
        _LAYOUTS[segments] = known
    return known


def _check_segments(segments: Tensor) -> int:
    """Checks a segment table and returns how many elements momentum and residual have to have."""
    if segments.device.type != "cpu" or segments.dtype != torch.int64 or segments.dim() != 2 or segments.size(1) != 5:
        raise RuntimeError("segments: expected a contiguous int64 CPU tensor of shape [segments, 5]")
    sound = (segments[:, :3] >= 0).all() & (segments[:, 2] % GROUP == 0).all() & (segments < 2**47).all()
    if not sound or not ((segments[:, 4] > 0) & (segments[:, 4] <= segments[:, 3])).all():
        raise RuntimeError(
            f"segments: expected source, offset, state >= 0, state a multiple of {GROUP}, and 0 < entries <= numel"
        )
    for columns in ([2], [0, 1]):  # two segments on the same elements would race
        spans = sorted(([row[c] for c in columns], row[3]) for row in segments.tolist())
        for (before, numel), (start, _) in pairwise(spans):
            if before[:-1] == start[:-1] and before[-1] + numel > start[-1]:
                raise RuntimeError("segments: expected none to overlap")
    return int((segments[:, 2] + segments[:, 3]).max())


def _bucket_args(segments: Tensor, workspace: Tensor, wire_dtype: torch.dtype) -> _BucketArgs:
    if wire_dtype not in FLOAT_TYPE:
        raise RuntimeError(f"wire_dtype: expected float32, bfloat16 or float16, got {wire_dtype}")
    _, tiles, entries, nbytes = _layout(segments)
    pointer = _address(workspace, "workspace", torch.uint8, nbytes, workspace)
    if workspace.numel() != nbytes:
        raise RuntimeError(
            f"workspace: expected the {nbytes} bytes that dgc.ops.workspace() makes for these segments, got "
            f"{workspace.numel()}"
        )
    return _BucketArgs(len(segments), tiles, entries, pointer, FLOAT_TYPE[wire_dtype])


def _address(
    tensor: Tensor | None, name: str, dtype: torch.dtype, min_numel: int, as_: Tensor, *, aligned: bool = False
) -> int | None:
    if tensor is None:
        return None
    if tensor.device != as_.device or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.numel() < min_numel:
        raise RuntimeError(
            f"{name}: expected a contiguous {dtype} tensor on {as_.device} with at least {min_numel} elements, got "
            f"{tensor.dtype} on {tensor.device} with {tensor.numel()}{'' if tensor.is_contiguous() else ', with gaps'}"
        )
    pointer = tensor.data_ptr()
    if aligned and pointer % 16:
        raise RuntimeError(f"{name}: expected memory aligned to 16 bytes; a view into the middle of a tensor is not")
    return pointer


def _sources(tensors: Sequence[Tensor], name: str, segments: Tensor, as_: Tensor) -> _Sources:
    if len(tensors) > MAX_SOURCES:
        raise RuntimeError(
            f"{name}: expected at most {MAX_SOURCES} tensors a bucket, got {len(tensors)}: use smaller buckets"
        )
    sources = _Sources()
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in FLOAT_TYPE:
            raise RuntimeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
        sources.data[i] = _address(tensor, name, tensor.dtype, 0, as_)
        sources.type[i] = FLOAT_TYPE[tensor.dtype]
    for source, offset, _, numel, _ in segments.tolist():
        if source >= len(tensors) or offset + numel > tensors[source].numel():
            raise RuntimeError(
                f"{name}: a segment of {numel} elements at offset {offset} of tensor {source} does not fit"
            )
    return sources


def source_folder() -> Path:
    """Returns where the kernels' source is: inside an installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "csrc"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "csrc"


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
            "(pip install --no-build-isolation '.[cupy]' for CUDA 13), or uninstall it: plain PyTorch then runs, slower"
        ) from error

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


def register_cupy(library: torch.library.Library) -> None:
    """Makes CuPy's kernels the ops' implementation for CUDA tensors."""
    for op in ("compress_", "unpack", "restore_", "subtract_"):
        library.impl(op, _on_device(op), "CUDA")
