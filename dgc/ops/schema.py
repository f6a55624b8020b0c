"""The ops. Each has a block: its function with the documentation, its schema, and its fake, which checks arguments.

Kernels are in csrc/, the same in plain PyTorch in dgc/ops/reference.py; dgc/ops/choice.py registers them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .segments import COLUMNS
from .wire import layout_of

LIBRARY = torch.library.Library("dgc", "DEF")
OPS: list[str] = []
"""The names of all ops. Everything that is made for each of them is made from this list."""


def _op(schema: str) -> Callable[[Callable[..., None]], None]:
    """Defines an op, and registers the decorated function as its fake, for tensors that have shapes and no contents."""

    def register(fake: Callable[..., None]) -> None:
        name = LIBRARY.define(schema)
        # The same as register_fake(), which takes milliseconds at import to look for the caller's source.
        LIBRARY.impl(name, fake, "Meta")
        OPS.append(name)

    return register


def _check(tensor: Tensor | None, name: str, dtype: torch.dtype, least: int) -> None:
    """Checks the type of a tensor, and that it has so many elements."""
    if tensor is not None:
        torch._check(tensor.dtype == dtype, lambda: f"{name}: expected {dtype}, got {tensor.dtype}")
        torch._check(
            tensor.numel() >= least, lambda: f"{name}: expected at least {least} elements, got {tensor.numel()}"
        )


def _check_floats(tensors: Sequence[Tensor], name: str) -> None:
    """Checks that gradients have types that the kernels know."""
    for tensor in tensors:
        _check_float(tensor.dtype, name)


def _check_float(dtype: torch.dtype, name: str) -> None:
    """Checks that the kernels know a type."""
    floats = torch.float32, torch.bfloat16, torch.float16
    torch._check(dtype in floats, lambda: f"{name}: expected float32, bfloat16 or float16, got {dtype}")


def _check_segments(segments: Tensor) -> int:
    """Checks the form of a segment table, and returns its rows."""
    torch._check(
        segments.dtype == torch.int64 and segments.dim() == 2 and segments.size(1) == len(COLUMNS),
        lambda: f"segments: expected int64 [segments, {len(COLUMNS)}], got {segments.dtype} {tuple(segments.shape)}",
    )
    return segments.size(0)


def _least_bytes(rows: int, wire_dtype: torch.dtype) -> int:
    """Returns the bytes of the smallest payload: every parameter has a tile and an entry."""
    _check_float(wire_dtype, "wire_dtype")
    return layout_of(rows, rows, rows, wire_dtype.itemsize).nbytes


def _check_masking(sent_momentum: Tensor | None, momentum: Tensor | None, rows: int) -> None:
    """Checks that sent_momentum goes with a momentum."""
    torch._check(
        sent_momentum is None or momentum is not None,
        lambda: "sent_momentum: expected None where momentum is None",
    )
    _check(sent_momentum, "sent_momentum", torch.float32, rows)


def compress_(
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
    """Moves gradients into u and v, and packs the k largest entries of every parameter's v (paper, Algorithm 4).

    For each parameter: h = scale * gradient; u <- mu*u + h; v <- v + u, or v + h + mu*u with Nesterov; exactly the k
    entries of v largest in magnitude (ties to the smaller index) go into the payload, rounded to the wire type, and are
    taken off v; where something was sent, u becomes 0 (momentum factor masking). An entry whose new v would not be
    finite keeps its u and v, and the payload's non-finite flag is set.

    Where a parameter's unit is 32, what is chosen are whole groups of 32 consecutive elements, counted from its first:
    the k / 32 groups whose largest |v| are the largest (ties to the smaller index).

    Args:
        gradients: contiguous tensors, float32, bfloat16 or float16, that hold the bucket's gradients. Used up: what is
            left in them is what unpack expects there, zeros on the CPU.
        momentum: u, float32 [elements], or None where mu is 0 throughout.
        residual: v, float32 [elements].
        segments: int64 [segments, 6] on the CPU, a row per parameter as in segments.COLUMNS.
        mu: float32 [segments], the momentum factor of each parameter.
        scale: float32 [1], what gradients are multiplied with: clipping, and the inverse of a loss scale.
        payload: uint8 [wire_layout(...).nbytes]. Its header is the caller's (wire.stamp), except the flags.
        workspace: from workspace() for these segments.
        sent_momentum: float32 [entries], receives u of the sent entries before it is masked. None: no masking.
        nesterov: whether v accumulates the Nesterov form.
        wire_dtype: type of the values in the payload: float32, bfloat16 or float16.

    Raises:
        RuntimeError: a tensor that is too small, of another type, or on another device.
    """
    torch.ops.dgc.compress_(
        gradients, momentum, residual, segments, mu, scale, payload, workspace, sent_momentum, nesterov, wire_dtype
    )


@_op(
    "compress_(Tensor(a!)[] gradients, Tensor(b!)? momentum, Tensor(c!) residual, Tensor segments, Tensor mu, "
    "Tensor scale, Tensor(d!) payload, Tensor(e!) workspace, Tensor(f!)? sent_momentum, bool nesterov, "
    "ScalarType wire_dtype) -> ()"
)
def _(
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
    rows = _check_segments(segments)
    _check_floats(gradients, "gradients")
    _check(momentum, "momentum", torch.float32, rows)
    _check(residual, "residual", torch.float32, rows)
    _check(mu, "mu", torch.float32, rows)
    _check(scale, "scale", torch.float32, 1)
    _check(payload, "payload", torch.uint8, _least_bytes(rows, wire_dtype))
    _check(workspace, "workspace", torch.uint8, 4 * rows)
    _check_masking(sent_momentum, momentum, rows)


def unpack(
    payloads: Tensor,
    rank: int,
    segments: Tensor,
    workspace: Tensor,
    scale: Tensor,
    wire_dtype: torch.dtype,
    out: list[Tensor],
    status: Tensor,
) -> None:
    """Writes the average of all ranks' sent entries into the gradients: scale/N * sum over ranks 0..N-1, in order.

    A parameter whose gradient was zero on every rank keeps zeros: what was sent for it has to be given back (restore_),
    since DDP throws away the result of a parameter that no rank used. Where any rank left non-finite entries out, the
    first element of every parameter that was used becomes NaN: as after an all-reduce, whoever looks at gradients
    before a step, such as GradScaler, sees it on every rank.

    Args:
        payloads: uint8 [world size, bytes], one row a rank.
        rank: of this process; its header is the one that the others' must equal.
        segments: as for compress_.
        workspace: as for compress_.
        scale: float32 [1], what averages are multiplied with: the loss scale.
        wire_dtype: as for compress_.
        out: the tensors that `source` and `offset` of the segments refer to, as compress_ left them, or zeros: on the
            CPU only what was sent is written.
        status: int32 [world size + 1], receives 0 for each rank, or a code of wire.STATUS, where `out` is as it was;
            or wire.NON_FINITE_STATUS where that rank met non-finite entries. Then 1 if an average overflowed.
    """
    torch.ops.dgc.unpack(payloads, rank, segments, workspace, scale, wire_dtype, out, status)


@_op(
    "unpack(Tensor payloads, int rank, Tensor segments, Tensor(a!) workspace, Tensor scale, ScalarType wire_dtype, "
    "Tensor(b!)[] out, Tensor(c!) status) -> ()"
)
def _(
    payloads: Tensor,
    rank: int,
    segments: Tensor,
    workspace: Tensor,
    scale: Tensor,
    wire_dtype: torch.dtype,
    out: list[Tensor],
    status: Tensor,
) -> None:
    rows = _check_segments(segments)
    least = _least_bytes(rows, wire_dtype)
    torch._check(
        payloads.dim() == 2 and payloads.size(1) >= least and 0 <= rank < payloads.size(0),
        lambda: (
            f"payloads: expected a row of {least} bytes or more for each rank, this rank's ({rank}) among them, "
            f"got {tuple(payloads.shape)}"
        ),
    )
    _check(payloads, "payloads", torch.uint8, 0)
    _check(workspace, "workspace", torch.uint8, 4 * rows)
    _check(scale, "scale", torch.float32, 1)
    _check_floats(out, "out")
    _check(status, "status", torch.int32, payloads.size(0) + 1)


def restore_(
    payload: Tensor,
    which: Tensor,
    segments: Tensor,
    workspace: Tensor,
    sent_momentum: Tensor | None,
    momentum: Tensor | None,
    residual: Tensor,
    wire_dtype: torch.dtype,
) -> None:
    """Undoes select and pack: the entries sent for the chosen parameters return to residual and momentum.

    To the bit, but for magnitudes from 2^29 on sent as float16, whose rest does not fit into a float32.

    Args:
        payload: this rank's own, as compress_ wrote it.
        which: uint8 [segments], 1 for each parameter whose entries come back.
        segments: as for compress_.
        workspace: as for compress_.
        sent_momentum: as compress_ left it, or None.
        momentum: u, or None.
        residual: v.
        wire_dtype: as for compress_.
    """
    torch.ops.dgc.restore_(payload, which, segments, workspace, sent_momentum, momentum, residual, wire_dtype)


@_op(
    "restore_(Tensor payload, Tensor which, Tensor segments, Tensor workspace, Tensor? sent_momentum, "
    "Tensor(a!)? momentum, Tensor(b!) residual, ScalarType wire_dtype) -> ()"
)
def _(
    payload: Tensor,
    which: Tensor,
    segments: Tensor,
    workspace: Tensor,
    sent_momentum: Tensor | None,
    momentum: Tensor | None,
    residual: Tensor,
    wire_dtype: torch.dtype,
) -> None:
    rows = _check_segments(segments)
    _check(payload, "payload", torch.uint8, _least_bytes(rows, wire_dtype))
    _check(which, "which", torch.uint8, rows)
    _check(workspace, "workspace", torch.uint8, 4 * rows)
    _check_masking(sent_momentum, momentum, rows)
    _check(momentum, "momentum", torch.float32, rows)
    _check(residual, "residual", torch.float32, rows)


def subtract_(parameters: list[Tensor], updates: list[Tensor], lr: float, skip: Tensor | None = None) -> None:
    """Takes lr * update off each parameter, at the cost of reading the updates where these are nearly all zero.

    Args:
        parameters: contiguous, float32.
        updates: one for each, of the same size; any values, so nothing is assumed of what unpack wrote.
        lr: the learning rate.
        skip: uint8 with one element, on the same device; where it is not 0, nothing changes. None: never.
    """
    torch.ops.dgc.subtract_(parameters, updates, lr, skip)
    # The kernel writes behind autograd's back; this keeps its check against modified saved tensors alive.
    torch.autograd.graph.increment_version(parameters)


@_op("subtract_(Tensor(a!)[] parameters, Tensor[] updates, float lr, Tensor? skip) -> ()")
def _(parameters: list[Tensor], updates: list[Tensor], lr: float, skip: Tensor | None) -> None:
    torch._check(
        len(parameters) == len(updates),
        lambda: f"updates: expected one for each of {len(parameters)} parameters, got {len(updates)} of them",
    )
    _check(skip, "skip", torch.uint8, 1)
    for parameter, update in zip(parameters, updates, strict=True):
        _check(parameter, "parameters", torch.float32, 0)
        _check(update, "updates", torch.float32, parameter.numel())
