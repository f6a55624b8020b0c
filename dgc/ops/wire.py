"""Where everything stands in the bytes of one rank and one bucket. csrc/wire.h is its twin, docs/wire.md explains it.

A payload travels, dgc::encode_ makes it of a selection, which compress_ writes and unpack reads:

    selection: header (32) | used (1 a parameter) | tile ends (4 a tile) | indices (2 an entry) | values (4 or 2)
    payload:   header (32) | used (1 a parameter) | scales | upper bits of the indices | low bits of them | values

Each section starts at a multiple of 16 bytes. A tile is a stretch of 65,536 elements of one parameter; a selection's
index is 16 bits, counted inside its tile; a tile's end is the number of entries of the bucket up to and including it.
Entries are sorted by parameter, then by index. How many entries a parameter has is fixed by density, so all ranks'
payloads have the same size and one all-gather without a size exchange carries them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 65536
GROUP = 32
HEADER_BYTES = 32
ALIGN = 16
MAGIC = int.from_bytes(b"DGCWIRE2", "little")
NON_FINITE = 1
"""A flag of the header: this rank left entries out because they were not finite."""
USED, LEFT_OUT = 1, 2
"""The bits of a parameter's byte: its gradient was not zero; entries were left out because they were not finite."""

NON_FINITE_STATUS = 256
STATUS = {
    1: "these are not bytes of this version of dgc",
    2: "it is at another step: a rank skipped a backward pass or ran one more",
    3: "its parameters, their order, its DGC configuration or its loss scale differ, or it alone has thrown a "
    "gradient away before its last step",
    4: "its indices are not those of so many entries",
    5: "an index is out of bounds or out of order",
    6: "a value is not finite",
}


class PayloadError(RuntimeError):
    """Bytes from another rank that cannot be what this rank's peers should have sent, or that show other replicas.

    Nothing of them was used.
    """


def div_up(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


def align_up(nbytes: int, to: int = ALIGN) -> int:
    """Returns the next multiple of `to` that is not below nbytes."""
    return div_up(nbytes, to) * to


class WireLayout(NamedTuple):
    """Byte offsets of a payload's sections, and its size."""

    used: int
    ends: int
    indices: int
    values: int
    nbytes: int


class PayloadLayout(NamedTuple):
    """Byte offsets of a payload's sections, and its size."""

    scales: int
    upper: int
    lower: int
    values: int
    nbytes: int


def payload_layout(segments: int, entries: int, uppers: int, lowers: int, value_bits: int) -> PayloadLayout:
    """Returns where the sections of a payload start.

    Args:
        segments: parameters of the bucket.
        entries: of all its parameters.
        uppers: 32-bit words with the upper bits of indices.
        lowers: 32-bit words with their low bits.
        value_bits: 32, 16, 8 or 4, of one value.
    """
    scales = align_up(HEADER_BYTES + segments)
    upper = align_up(scales + (8 * segments if value_bits < 16 else 0))
    lower = align_up(upper + 4 * uppers)
    values = align_up(lower + 4 * lowers)
    nbytes = (entries + segments + 1) // 2 if value_bits == 4 else entries * value_bits // 8
    return PayloadLayout(scales, upper, lower, values, align_up(values + nbytes))


def check_value_bits(wire_dtype: torch.dtype, value_bits: int) -> None:
    """Checks that values of a selection's type can travel in so many bits: its own, or, of float32, 8 or 4.

    Raises:
        RuntimeError: they cannot.
    """
    own = 8 * wire_dtype.itemsize
    if value_bits != own and not (own == 32 and value_bits in (8, 4)):
        raise RuntimeError(
            f"value_bits: expected {own}{', 8 or 4' if own == 32 else ''} for {wire_dtype}, got {value_bits}"
        )


def low_bits(numel: int, entries: int) -> int:
    """Returns how many low bits of each index stand as they are: log2(numel / entries) rounded down, at most 16."""
    return min((numel // entries).bit_length() - 1, 16)


def upper_bits(numel: int, entries: int) -> int:
    """Returns the bits that say the high parts of a parameter's indices in unary: a one for each, and zeros."""
    return entries + ((numel - 1) >> low_bits(numel, entries))


def layout_of(segments: int, tiles: int, entries: int, value_bytes: int) -> WireLayout:
    """Returns where the sections of a payload start.

    Args:
        segments: parameters of the bucket.
        tiles: of all its parameters.
        entries: of all its parameters.
        value_bytes: 4 or 2, of one value.
    """
    used = HEADER_BYTES
    ends = align_up(used + segments)
    indices = align_up(ends + 4 * tiles)
    values = align_up(indices + 2 * entries)
    return WireLayout(used, ends, indices, values, align_up(values + value_bytes * entries))


def header(payload: Tensor) -> Tensor:
    """Returns the header of a payload as a view: int64 [4], magic, step, fingerprint, flags."""
    return payload[..., :HEADER_BYTES].view(torch.int64)


def stamp(payload: Tensor, fingerprint: int) -> Tensor:
    """Writes what the other ranks will compare with theirs; the flags are compress_'s to write.

    Returns:
        A view of the step in the header, int64 [1], for the caller to fill.
    """
    words = header(payload)
    words[0] = MAGIC
    words[2] = fingerprint
    return words[1:2]


def check_status(codes: Sequence[int], payloads: Tensor) -> list[int]:
    """Returns the ranks whose gradients had non-finite entries.

    Args:
        codes: by rank, from dgc::unpack.
        payloads: uint8 [world size, bytes], for the step numbers of the message.

    Raises:
        PayloadError: a rank sent what does not fit; the message names it.
    """
    for rank, code in enumerate(codes):
        reason = STATUS.get(code & (NON_FINITE_STATUS - 1))
        if reason is not None:
            steps = header(payloads)[:, 1].tolist()
            raise PayloadError(
                f"payload of rank {rank}: {reason}. Steps by rank: {steps}. Nothing of it was applied; "
                "restart all ranks from the same checkpoint with the same model and configuration"
            )
    return [rank for rank, code in enumerate(codes) if code & NON_FINITE_STATUS]
