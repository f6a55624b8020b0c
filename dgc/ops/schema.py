"""The ops: schemas, fakes and documentation. Kernels are in csrc/, the same in plain PyTorch in dgc/ops/reference.py.

Importing this module loads the native library, where it was built.
"""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import cuda, cupy, reference
from .segments import Segments, segments_of
from .wire import GROUP, div_up

_LIBRARY = torch.library.Library("dgc", "DEF")
_LIBRARY.define(
    "compress_(Tensor(a!)[] gradients, Tensor(b!)? momentum, Tensor(c!) residual, Tensor segments, Tensor mu, "
    "Tensor scale, Tensor(d!) payload, Tensor(e!) workspace, Tensor(f!)? sent_momentum, bool nesterov, "
    "ScalarType wire_dtype) -> ()"
)
_LIBRARY.define(
    "unpack(Tensor payloads, int rank, Tensor segments, Tensor(a!) workspace, Tensor scale, ScalarType wire_dtype, "
    "Tensor(b!)[] out, Tensor(c!) status) -> ()"
)
_LIBRARY.define(
    "restore_(Tensor payload, Tensor which, Tensor segments, Tensor workspace, Tensor? sent_momentum, "
    "Tensor(a!)? momentum, Tensor(b!) residual, ScalarType wire_dtype) -> ()"
)
_LIBRARY.define("subtract_(Tensor(a!)[] parameters, Tensor[] updates, float lr, Tensor? skip) -> ()")
# The reference serves every device that has no kernel of its own.
for _name in ("compress_", "unpack", "restore_", "subtract_"):
    _LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _load_native() -> bool:
    library = next(Path(__file__).parent.parent.glob("_native*.so"), None)
    if library is None:
        warnings.warn(
            "dgc: the native library was not built, so plain PyTorch is used: correct, but some 25 times slower. "
            "Install g++ and reinstall with `pip install --no-build-isolation .`",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    torch.ops.load_library(library)
    return True


_NATIVE = _load_native()
_NATIVE_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("dgc::compress_", "CUDA")
_CUPY = not _NATIVE_CUDA and cupy.has_cupy()
if _CUPY:
    cupy.register_cupy(_LIBRARY)


def backend(device: str | torch.device) -> str:
    """Returns what runs the ops on a device.

    "native": built by setup.py; "cupy", on CUDA only: the same kernels, compiled by CuPy at first use; "reference":
    plain PyTorch.
    """
    kind = torch.device(device).type
    if (kind == "cpu" and _NATIVE) or (kind == "cuda" and _NATIVE_CUDA):
        return "native"
    return "cupy" if kind == "cuda" and _CUPY else "reference"


def workspace(segments: Tensor | Segments, device: torch.device) -> Tensor:
    """Returns what the ops need besides their arguments, for these segments: uint8.

    On the CPU it is scratch, 4 bytes for every 32 elements. On CUDA it holds tables too, and must be left as it is.

    Raises:
        RuntimeError: a CUDA device older than the kernels need.
    """
    choice = backend(device)
    if device.type == "cuda" and choice != "reference":
        cuda.check_capability(device, choice)
        return cuda.workspace(segments, device)
    groups = sum(div_up(numel, GROUP) for numel in segments_of(segments).tile_numel.tolist())
    return torch.empty(4 * groups, dtype=torch.uint8, device=device)


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


@torch.library.register_fake("dgc::compress_", lib=_LIBRARY)
def _(*_args: object) -> None:
    return None


@torch.library.register_fake("dgc::unpack", lib=_LIBRARY)
def _(*_args: object) -> None:
    return None


@torch.library.register_fake("dgc::restore_", lib=_LIBRARY)
def _(*_args: object) -> None:
    return None


@torch.library.register_fake("dgc::subtract_", lib=_LIBRARY)
def _(*_args: object) -> None:
    return None


__all__ = ["backend", "compress_", "restore_", "subtract_", "unpack", "workspace"]
logging.getLogger("dgc").debug("ops on the CPU: %s", backend("cpu"))
