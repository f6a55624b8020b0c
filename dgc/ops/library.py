"""The library of ops: how an op is defined, and the checks that the fakes share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .segments import COLUMNS
from .wire import layout_of

LIBRARY = torch.library.Library("dgc", "DEF")
OPS: list[str] = []
"""The names of all ops. Everything that is made for each of them is made from this list."""


def op(schema: str) -> Callable[[Callable[..., None]], None]:
    """Defines an op, and registers the decorated function as its fake, for tensors that have shapes and no contents."""

    def register(fake: Callable[..., None]) -> None:
        name = LIBRARY.define(schema)
        # The same as register_fake(), which takes milliseconds at import to look for the caller's source.
        LIBRARY.impl(name, fake, "Meta")
        OPS.append(name)

    return register


def check(tensor: Tensor | None, name: str, dtype: torch.dtype, least: int) -> None:
    """Checks the type of a tensor, and that it has so many elements."""
    if tensor is not None:
        torch._check(tensor.dtype == dtype, lambda: f"{name}: expected {dtype}, got {tensor.dtype}")
        torch._check(
            tensor.numel() >= least, lambda: f"{name}: expected at least {least} elements, got {tensor.numel()}"
        )


def check_floats(tensors: Sequence[Tensor], name: str) -> None:
    """Checks that gradients have types that the kernels know."""
    for tensor in tensors:
        check_float(tensor.dtype, name)


def check_float(dtype: torch.dtype, name: str) -> None:
    """Checks that the kernels know a type."""
    floats = torch.float32, torch.bfloat16, torch.float16
    torch._check(dtype in floats, lambda: f"{name}: expected float32, bfloat16 or float16, got {dtype}")


def check_segments(segments: Tensor) -> int:
    """Checks the form of a segment table, and returns its rows."""
    torch._check(
        segments.dtype == torch.int64 and segments.dim() == 2 and segments.size(1) == len(COLUMNS),
        lambda: f"segments: expected int64 [segments, {len(COLUMNS)}], got {segments.dtype} {tuple(segments.shape)}",
    )
    return segments.size(0)


def least_bytes(rows: int, wire_dtype: torch.dtype) -> int:
    """Returns the bytes of the smallest payload: every parameter has a tile and an entry."""
    check_float(wire_dtype, "wire_dtype")
    return layout_of(rows, rows, rows, wire_dtype.itemsize).nbytes
