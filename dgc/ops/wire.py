"""The wire format of the bytes that one rank sends for one bucket. csrc/wire.h is its twin.

    header (32) | used (1 a parameter) | tile ends (4 a tile) | indices (2 an entry) | values (4 or 2 an entry)

Each section starts at a multiple of 16 bytes. A tile is a stretch of 65,536 elements of one parameter; an index is
16 bits, counted inside its tile; a tile's end is the number of entries of the bucket up to and including it. Entries
are sorted by parameter, then by index. How many entries a parameter has is fixed by density, so all ranks' payloads
have the same size and one all-gather without a size exchange carries them.
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
MAGIC = int.from_bytes(b"DGCWIRE1", "little")
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
    4: "its tile table contradicts itself",
    5: "an index is out of bounds or out of order",
    6: "a value is not finite",
}


class PayloadError(RuntimeError):
    """Bytes from another rank that cannot be what this rank's peers should have sent. Nothing of them was used."""


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
