"""The ops that turn a selection into the bytes that travel, and back, in blocks as in schema.py."""

import torch
from torch import Tensor

from .library import check, check_segments, least_bytes, op
from .wire import HEADER_BYTES, align_up, check_value_bits


def encode_(
    selection: Tensor,
    segments: Tensor,
    workspace: Tensor,
    residual: Tensor,
    wire_dtype: torch.dtype,
    value_bits: int,
    payload: Tensor,
) -> None:
    """Makes of a selection the payload that travels: indices in Elias-Fano form, values in their type or 8 or 4 bits.

    Where values have 8 or 4 bits, those in the selection are replaced by what receivers will read, and what rounding
    takes goes to v: exactly, but for values beyond the scale of 4 bits, which ends at 2^12 times the least
    (docs/wire.md).

    Args:
        selection: as compress_ wrote it.
        segments: as for compress_.
        workspace: as for compress_.
        residual: v.
        wire_dtype: type of the values in the selection.
        value_bits: of a value in the payload: those of wire_dtype, or, where it is float32, 8 or 4.
        payload: uint8 [Segments.payload(value_bits).nbytes], is written.
    """
    torch.ops.dgc.encode_(selection, segments, workspace, residual, wire_dtype, value_bits, payload)


@op(
    "encode_(Tensor(a!) selection, Tensor segments, Tensor(b!) workspace, Tensor(c!) residual, ScalarType wire_dtype, "
    "int value_bits, Tensor(d!) payload) -> ()"
)
def _(
    selection: Tensor,
    segments: Tensor,
    workspace: Tensor,
    residual: Tensor,
    wire_dtype: torch.dtype,
    value_bits: int,
    payload: Tensor,
) -> None:
    rows = check_segments(segments)
    check(selection, "selection", torch.uint8, least_bytes(rows, wire_dtype))
    check_value_bits(wire_dtype, value_bits)
    check(workspace, "workspace", torch.uint8, 4 * rows)
    check(residual, "residual", torch.float32, rows)
    check(payload, "payload", torch.uint8, align_up(HEADER_BYTES + rows))


def decode(
    payloads: Tensor,
    segments: Tensor,
    workspace: Tensor,
    wire_dtype: torch.dtype,
    value_bits: int,
    selections: Tensor,
) -> None:
    """Makes of all ranks' payloads the selections that unpack reads, whatever their bytes are.

    Upper bits that are not those of so many indices become a tile end that unpack refuses, a scale that encode_ cannot
    have written becomes values that are NaN. All else unpack checks as it is.

    Args:
        payloads: uint8 [world size, bytes], one row a rank.
        segments: as for compress_.
        workspace: as for compress_.
        wire_dtype: as for encode_.
        value_bits: as for encode_.
        selections: uint8 [world size, bytes of a selection], is written.
    """
    torch.ops.dgc.decode(payloads, segments, workspace, wire_dtype, value_bits, selections)


@op(
    "decode(Tensor payloads, Tensor segments, Tensor(a!) workspace, ScalarType wire_dtype, int value_bits, "
    "Tensor(b!) selections) -> ()"
)
def _(
    payloads: Tensor,
    segments: Tensor,
    workspace: Tensor,
    wire_dtype: torch.dtype,
    value_bits: int,
    selections: Tensor,
) -> None:
    rows = check_segments(segments)
    least = least_bytes(rows, wire_dtype)
    check_value_bits(wire_dtype, value_bits)
    check(payloads, "payloads", torch.uint8, 0)
    check(selections, "selections", torch.uint8, 0)
    torch._check(
        payloads.dim() == selections.dim() == 2,
        lambda: (
            f"payloads: expected a row for each rank, and as many selections, got {tuple(payloads.shape)} and "
            f"{tuple(selections.shape)}"
        ),
    )
    torch._check(
        selections.size(0) == payloads.size(0) and selections.size(1) >= least,
        lambda: f"selections: expected {payloads.size(0)} rows of {least} bytes or more, got {tuple(selections.shape)}",
    )
    check(workspace, "workspace", torch.uint8, 4 * rows)
