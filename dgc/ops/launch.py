"""The CUDA ops from Python, for kernels that were not built with the native library: arguments, checks, launches.

The twin of csrc/cuda/ops.cpp, which fills the arguments, and of csrc/cuda/launch.cu, which queues the kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .accumulation import check_rule
from .args import (
    FLOAT_TYPE,
    MAX_KEPT,
    MAX_PAIRS,
    MAX_SOURCES,
    BucketArgs,
    CodecArgs,
    CompressArgs,
    Pair,
    RestoreArgs,
    Sources,
    SubtractArgs,
    UnpackArgs,
)
from .cuda import CHUNK, CHUNKS_PER_TILE, THREADS, workspace_sizes
from .segments import Segments, checked
from .wire import GROUP, check_value_bits, div_up

Launch = Callable[[str, int, int, ctypes.Structure], None]
"""Queues a kernel: its name, blocks in x and y, and its argument."""


class Kernels:
    """The ops as sequences of launches. Signatures and meaning are those of dgc/ops/schema.py."""

    def __init__(self, launch: Launch) -> None:
        """Keeps the function that queues a kernel on the current stream of the current device."""
        self.launch = launch

    def compress_(
        self,
        gradients: list[Tensor],
        rule: int,
        kept: list[Tensor],
        residual: Tensor,
        segments: Tensor,
        numbers: Tensor,
        scale: Tensor,
        payload: Tensor,
        workspace: Tensor,
        sent: Tensor | None,
        wire_dtype: torch.dtype,
    ) -> None:
        """Accumulates, selects and packs: see dgc.ops.compress_."""
        known = _sound(segments)
        check_rule(rule, kept, numbers, sent, len(known))
        pointers = [_address(x, "kept", torch.float32, known.n_state, workspace, aligned=True) for x in kept]
        args = CompressArgs(
            _bucket_args(known, workspace, wire_dtype),
            (ctypes.c_void_p * MAX_KEPT)(*pointers),
            _address(residual, "residual", torch.float32, known.n_state, workspace, aligned=True),
            _address(numbers, "numbers", torch.float32, 0, workspace),
            _address(scale, "scale", torch.float32, 1, workspace),
            _address(payload, "payload", torch.uint8, known.wire(wire_dtype).nbytes, workspace, aligned=True),
            _address(sent, "sent", torch.float32, known.n_entries, workspace),
            rule,
            _sources(gradients, "gradients", known, workspace),
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
        known = _sound(segments)
        nbytes = known.wire(wire_dtype).nbytes
        if payloads.dim() != 2 or payloads.size(1) != nbytes or not 0 <= rank < payloads.size(0) < 65536:
            raise RuntimeError(
                f"payloads: expected a row of {nbytes} bytes for each rank, this rank's ({rank}) among them, got "
                f"{tuple(payloads.shape)}"
            )
        ranks = payloads.size(0)
        args = UnpackArgs(
            _bucket_args(known, workspace, wire_dtype),
            _address(payloads, "payloads", torch.uint8, 0, workspace, aligned=True),
            ranks,
            rank,
            _address(scale, "scale", torch.float32, 1, workspace),
            _address(status, "status", torch.int32, ranks + 1, workspace),
            _sources(out, "out", known, workspace),
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
        sent: Tensor | None,
        momentum: Tensor | None,
        residual: Tensor,
        wire_dtype: torch.dtype,
    ) -> None:
        """Puts back what was taken out for the chosen parameters: see dgc.ops.restore_."""
        known = _sound(segments)
        if sent is not None and momentum is None:
            raise RuntimeError("sent: expected None where momentum is None")
        args = RestoreArgs(
            _bucket_args(known, workspace, wire_dtype),
            _address(payload, "payload", torch.uint8, known.wire(wire_dtype).nbytes, workspace),
            _address(which, "which", torch.uint8, len(known), workspace),
            _address(sent, "sent", torch.float32, known.n_entries, workspace),
            _address(momentum, "momentum", torch.float32, known.n_state, workspace),
            _address(residual, "residual", torch.float32, known.n_state, workspace),
        )
        self.launch("dgc_restore", args.bucket.tiles, 1, args)

    def encode_(
        self,
        selection: Tensor,
        segments: Tensor,
        workspace: Tensor,
        residual: Tensor,
        wire_dtype: torch.dtype,
        value_bits: int,
        payload: Tensor,
    ) -> None:
        """Makes a payload of a selection: see dgc.ops.encode_."""
        known = _sound(segments)
        check_value_bits(wire_dtype, value_bits)
        args = CodecArgs(
            _bucket_args(known, workspace, wire_dtype),
            _address(selection, "selection", torch.uint8, known.wire(wire_dtype).nbytes, workspace, aligned=True),
            _address(payload, "payload", torch.uint8, known.payload(value_bits).nbytes, workspace, aligned=True),
            _address(residual, "residual", torch.float32, known.n_state, workspace),
            1,
            int(known.upper_words.sum()),
            int(known.lower_words.sum()),
            value_bits,
        )
        payload.zero_()
        self.launch("dgc_scale", args.bucket.tiles, 1, args)
        self.launch("dgc_encode", args.bucket.tiles, 1, args)

    def decode(
        self,
        payloads: Tensor,
        segments: Tensor,
        workspace: Tensor,
        wire_dtype: torch.dtype,
        value_bits: int,
        selections: Tensor,
    ) -> None:
        """Makes selections of payloads: see dgc.ops.decode."""
        known = _sound(segments)
        check_value_bits(wire_dtype, value_bits)
        ranks = len(payloads)
        rows = (("payloads", payloads, known.payload(value_bits)), ("selections", selections, known.wire(wire_dtype)))
        for name, tensor, at in rows:
            if tensor.shape != (ranks, at.nbytes) or ranks >= 65536:
                raise RuntimeError(
                    f"{name}: expected a row of {at.nbytes} bytes for each rank, fewer than 65536, got "
                    f"{tuple(tensor.shape)}"
                )
        args = CodecArgs(
            _bucket_args(known, workspace, wire_dtype),
            _address(selections, "selections", torch.uint8, 0, workspace, aligned=True),
            _address(payloads, "payloads", torch.uint8, 0, workspace, aligned=True),
            None,
            ranks,
            int(known.upper_words.sum()),
            int(known.lower_words.sum()),
            value_bits,
        )
        self.launch("dgc_decode", args.bucket.tiles, ranks, args)

    def subtract_(
        self, parameters: list[Tensor], updates: list[Tensor], lr: float, shrink: float, skip: Tensor | None
    ) -> None:
        """Shrinks each parameter and takes lr * update off it: see dgc.ops.subtract_."""
        if len(parameters) != len(updates):
            raise RuntimeError(
                f"updates: expected one for each of {len(parameters)} parameters, got {len(updates)} of them"
            )
        for first in range(0, len(parameters), MAX_PAIRS):
            pairs = list(zip(parameters, updates, strict=True))[first : first + MAX_PAIRS]
            args = SubtractArgs(_address(skip, "skip", torch.uint8, 1, parameters[0]), -lr, shrink, len(pairs))
            blocks = 0
            for i, (p, g) in enumerate(pairs):
                args.pairs[i] = Pair(
                    _address(p, "parameters", torch.float32, 0, parameters[0]),
                    _address(g, "updates", torch.float32, p.numel(), parameters[0]),
                    p.numel(),
                    blocks,
                )
                blocks += div_up(p.numel(), CHUNK)
            if blocks:
                self.launch("dgc_subtract", blocks, 1, args)


def _sound(table: Tensor) -> Segments:
    """Returns what a segment table says, where the kernels can work with it."""
    segments = checked(table)
    if any(row.state % GROUP for row in segments.rows):
        raise RuntimeError(f"segments: expected each state to be a multiple of {GROUP} on CUDA")
    return segments


def _bucket_args(segments: Segments, workspace: Tensor, wire_dtype: torch.dtype) -> BucketArgs:
    """Checks the workspace, and returns the argument that all kernels of a bucket need."""
    if wire_dtype not in FLOAT_TYPE:
        raise RuntimeError(f"wire_dtype: expected float32, bfloat16 or float16, got {wire_dtype}")
    nbytes = sum(workspace_sizes(len(segments), segments.n_tiles, segments.n_entries))
    pointer = _address(workspace, "workspace", torch.uint8, nbytes, workspace)
    if workspace.numel() != nbytes:
        raise RuntimeError(
            f"workspace: expected the {nbytes} bytes that dgc.ops.workspace() makes for these segments, got "
            f"{workspace.numel()}"
        )
    return BucketArgs(len(segments), segments.n_tiles, segments.n_entries, pointer, FLOAT_TYPE[wire_dtype])


def _address(
    tensor: Tensor | None, name: str, dtype: torch.dtype, min_numel: int, as_: Tensor, *, aligned: bool = False
) -> int | None:
    """Checks a tensor and returns its address; None for None."""
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


def _sources(tensors: Sequence[Tensor], name: str, segments: Segments, as_: Tensor) -> Sources:
    """Checks the tensors that hold gradients, and returns their addresses and types."""
    if len(tensors) > MAX_SOURCES:
        raise RuntimeError(
            f"{name}: expected at most {MAX_SOURCES} tensors a bucket, got {len(tensors)}: use smaller buckets"
        )
    sources = Sources()
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in FLOAT_TYPE:
            raise RuntimeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
        sources.data[i] = _address(tensor, name, tensor.dtype, 0, as_)
        sources.type[i] = FLOAT_TYPE[tensor.dtype]
    for source, offset, _, numel, *_ in segments.rows:
        if source >= len(tensors) or offset + numel > tensors[source].numel():
            raise RuntimeError(
                f"{name}: a segment of {numel} elements at offset {offset} of tensor {source} does not fit"
            )
    return sources
