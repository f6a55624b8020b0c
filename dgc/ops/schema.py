"""The ops of a step. Each has a block: its function with the documentation, its schema, and its fake, which checks.

Kernels are in csrc/, the same in plain PyTorch in dgc/ops/reference.py; dgc/ops/choice.py registers them.
"""

import torch
from torch import Tensor

from .accumulation import check_rule
from .library import check, check_floats, check_segments, least_bytes, op


def compress_(
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
    """Moves gradients into v by a rule, and packs the k largest entries of every parameter's v (paper, Algorithm 4).

    For each parameter: h = scale * gradient; the rule changes what it keeps, and gives an update; v <- decay*v +
    update; exactly the k entries of v largest in magnitude (ties to the smaller index) go into the payload, rounded to
    the wire type, and are taken off v; where something was sent, the first kept tensor, a momentum, becomes 0 (momentum
    factor masking). An entry of which a result would not be finite keeps what it had, and the payload's non-finite flag
    is set. The rules, with what they keep and their numbers after decay:

    - SUM: update = h. Keeps nothing, no numbers (paper, Algorithm 1).
    - MOMENTUM: u <- mu*u + h; update = u. Keeps u; mu (paper, section 3.1).
    - NESTEROV: u <- mu*u + h; update = h + mu*u. Keeps u; mu.
    - ADAM: m <- m + weight*(h - m); s <- b2*s + c1*h^2 + c2*m^2, with the new m; update = step*h / (sqrt(s)/root +
      eps). Keeps m and s; weight, b2, c1, c2, step, root, eps. weight is 1 - b1; c1 and c2 are not both 0. m serves s
      alone: with c1 = 1 - b2, c2 = 0, step = lr and root from the bias correction, update is what torch.optim.Adam
      with b1 = 0 subtracts.

    Args:
        gradients: contiguous tensors, float32, bfloat16 or float16, that hold the bucket's gradients. Used up: what is
            left in them is what unpack expects there, zeros on the CPU.
        rule: an Accumulation.
        kept: the rule's tensors, in its order, float32 [elements].
        residual: v, float32 [elements].
        segments: int64 [segments, 5] on the CPU, a row per parameter as in segments.COLUMNS.
        numbers: float32 [rows, segments], contiguous: decay, then the rule's own, for each parameter.
        scale: float32 [1], what gradients are multiplied with: clipping, and the inverse of a loss scale.
        payload: uint8 [wire_layout(...).nbytes]. Its header is the caller's (wire.stamp), except the flags.
        workspace: from workspace() for these segments.
        sent: float32 [entries], receives the first kept tensor's values at sent entries before they are masked. None:
            no masking.
        wire_dtype: type of the values in the payload: float32, bfloat16 or float16.

    Raises:
        RuntimeError: a tensor that is too small, of another type, or on another device; or not what the rule takes.
    """
    torch.ops.dgc.compress_(
        gradients, rule, kept, residual, segments, numbers, scale, payload, workspace, sent, wire_dtype
    )


@op(
    "compress_(Tensor(a!)[] gradients, int rule, Tensor(b!)[] kept, Tensor(c!) residual, Tensor segments, "
    "Tensor numbers, Tensor scale, Tensor(d!) payload, Tensor(e!) workspace, Tensor(f!)? sent, ScalarType wire_dtype) "
    "-> ()"
)
def _(
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
    rows = check_segments(segments)
    check_floats(gradients, "gradients")
    check_rule(rule, kept, numbers, sent, rows)
    for tensor in kept:
        check(tensor, "kept", torch.float32, rows)
    check(residual, "residual", torch.float32, rows)
    check(numbers, "numbers", torch.float32, 0)
    check(scale, "scale", torch.float32, 1)
    check(payload, "payload", torch.uint8, least_bytes(rows, wire_dtype))
    check(workspace, "workspace", torch.uint8, 4 * rows)
    check(sent, "sent", torch.float32, rows)


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


@op(
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
    rows = check_segments(segments)
    least = least_bytes(rows, wire_dtype)
    torch._check(
        payloads.dim() == 2 and payloads.size(1) >= least and 0 <= rank < payloads.size(0),
        lambda: (
            f"payloads: expected a row of {least} bytes or more for each rank, this rank's ({rank}) among them, "
            f"got {tuple(payloads.shape)}"
        ),
    )
    check(payloads, "payloads", torch.uint8, 0)
    check(workspace, "workspace", torch.uint8, 4 * rows)
    check(scale, "scale", torch.float32, 1)
    check_floats(out, "out")
    check(status, "status", torch.int32, payloads.size(0) + 1)


def restore_(
    payload: Tensor,
    which: Tensor,
    segments: Tensor,
    workspace: Tensor,
    sent: Tensor | None,
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
        sent: as compress_ left it, or None.
        momentum: the first kept tensor, or None.
        residual: v.
        wire_dtype: as for compress_.
    """
    torch.ops.dgc.restore_(payload, which, segments, workspace, sent, momentum, residual, wire_dtype)


@op(
    "restore_(Tensor payload, Tensor which, Tensor segments, Tensor workspace, Tensor? sent, "
    "Tensor(a!)? momentum, Tensor(b!) residual, ScalarType wire_dtype) -> ()"
)
def _(
    payload: Tensor,
    which: Tensor,
    segments: Tensor,
    workspace: Tensor,
    sent: Tensor | None,
    momentum: Tensor | None,
    residual: Tensor,
    wire_dtype: torch.dtype,
) -> None:
    rows = check_segments(segments)
    check(payload, "payload", torch.uint8, least_bytes(rows, wire_dtype))
    check(which, "which", torch.uint8, rows)
    check(workspace, "workspace", torch.uint8, 4 * rows)
    torch._check(sent is None or momentum is not None, lambda: "sent: expected None where momentum is None")
    check(sent, "sent", torch.float32, rows)
    check(momentum, "momentum", torch.float32, rows)
    check(residual, "residual", torch.float32, rows)


def subtract_(
    parameters: list[Tensor], updates: list[Tensor], lr: float, shrink: float = 1.0, skip: Tensor | None = None
) -> None:
    """Shrinks each parameter and takes lr * update off it: p <- shrink*p - lr*update, shrink*p rounded on its own.

    With a shrink of 1, at the cost of reading the updates where these are nearly all zero; with another one, in one
    pass over the parameters too.

    Args:
        parameters: contiguous, float32.
        updates: one for each, of the same size; any values, so nothing is assumed of what unpack wrote.
        lr: the learning rate.
        shrink: what the parameters are multiplied with: 1 - lr * decay is weight decay apart from the gradient.
        skip: uint8 with one element, on the same device; where it is not 0, nothing changes. None: never.
    """
    torch.ops.dgc.subtract_(parameters, updates, lr, shrink, skip)
    # The kernel writes behind autograd's back; this keeps its check against modified saved tensors alive.
    torch.autograd.graph.increment_version(parameters)


@op("subtract_(Tensor(a!)[] parameters, Tensor[] updates, float lr, float shrink, Tensor? skip) -> ()")
def _(parameters: list[Tensor], updates: list[Tensor], lr: float, shrink: float, skip: Tensor | None) -> None:
    torch._check(
        len(parameters) == len(updates),
        lambda: f"updates: expected one for each of {len(parameters)} parameters, got {len(updates)} of them",
    )
    check(skip, "skip", torch.uint8, 1)
    for parameter, update in zip(parameters, updates, strict=True):
        check(parameter, "parameters", torch.float32, 0)
        check(update, "updates", torch.float32, parameter.numel())
