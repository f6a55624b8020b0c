"""The wire format: where everything stands in the bytes that one rank sends for one bucket. csrc/wire.h is its twin.

    header (32) | used (1 a parameter) | tile ends (4 a tile) | indices (2 an entry) | values (4 or 2 an entry)

Each section starts at a multiple of 16 bytes. A tile is a stretch of 65,536 elements of one parameter; an index is
16 bits, counted inside its tile; a tile's end is the number of entries of the bucket up to and including it. Entries
are sorted by parameter, then by index. How many entries a parameter has is fixed by density, so all ranks' payloads
have the same size and one all-gather without a size exchange carries them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 65536
GROUP = 32
HEADER_BYTES = 32
ALIGN = 16
MAGIC = int.from_bytes(b"DGCWIRE1", "little")
NON_FINITE = 1
"""Flag of the header: this rank left entries out because they were not finite."""
USED, LEFT_OUT = 1, 2
"""Bits of a parameter's byte: its gradient was not zero; entries of it were left out because they were not finite."""

SEGMENT_COLUMNS = ("source", "offset", "state", "numel", "entries")
"""A row of the int64 segment table, one per compressed parameter of a bucket: which gradient tensor holds it, its first
element there, its first element in momentum and residual, its elements, and k, the entries it sends."""

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


def div_up_all(a: Tensor, b: int) -> Tensor:
    """Returns a / b, rounded up, of integers."""
    return (a + b - 1) // b


def align_up(nbytes: int, to: int = ALIGN) -> int:
    """Returns the next multiple of `to` that is not below nbytes."""
    return div_up(nbytes, to) * to


@dataclass(frozen=True)
class WireLayout:
    """Byte offsets of a payload's sections, and its size."""

    used: int
    ends: int
    indices: int
    values: int
    nbytes: int


def wire_layout(segments: Tensor, wire_dtype: torch.dtype) -> WireLayout:
    """Returns where the sections of a bucket's payload start.

    Args:
        segments: int64 [segments, 5], rows as in SEGMENT_COLUMNS.
        wire_dtype: of the values: float32, bfloat16 or float16.
    """
    tiles = sum(div_up(numel, TILE) for numel in segments[:, 3].tolist())
    entries = int(segments[:, 4].sum())
    used = HEADER_BYTES
    ends = align_up(used + len(segments))
    indices = align_up(ends + 4 * tiles)
    values = align_up(indices + 2 * entries)
    return WireLayout(used, ends, indices, values, align_up(values + wire_dtype.itemsize * entries))


class Entries(NamedTuple):
    """The sections of a selection behind its header and its marks: views, to be read and written.

    A selection is what dgc::compress_ writes and dgc::unpack reads; see docs/wire.md.
    """

    ends: Tensor
    """int32 [tiles]: entries of the bucket up to and including each tile."""
    indices: Tensor
    """int16 [entries], unsigned in truth: elements inside their tile, rising."""
    values: Tensor
    """[entries], in the selection's type."""


def entries_of(selection: Tensor, segments: Tensor, dtype: torch.dtype) -> Entries:
    """Returns the sections of a selection.

    Args:
        selection: uint8 [bytes].
        segments: int64 [segments, columns], rows as in SEGMENT_COLUMNS.
        dtype: of its values.
    """
    at = wire_layout(segments, dtype)
    tiles = int(div_up_all(segments[:, 3], TILE).sum())
    count = int(segments[:, 4].sum())
    return Entries(
        ends=selection[at.ends : at.ends + 4 * tiles].view(torch.int32),
        indices=selection[at.indices : at.indices + 2 * count].view(torch.int16),
        values=selection[at.values : at.values + dtype.itemsize * count].view(dtype),
    )


def positions(selection: Tensor, segments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns where a selection's entries stand in the flat tensors of memory, int64 [entries], and their values.

    Args:
        selection: uint8 [bytes], this rank's own.
        segments: int64 [segments, columns], rows as in SEGMENT_COLUMNS.
        dtype: of its values.
    """
    entries = entries_of(selection, segments, dtype)
    first = [state + tile * TILE for _, _, state, numel, *_ in segments.tolist() for tile in range(div_up(numel, TILE))]
    counts = entries.ends.diff(prepend=entries.ends.new_zeros(1)).long()
    tiles = torch.tensor(first, dtype=torch.int64, device="cpu").to(selection.device)
    return torch.repeat_interleave(tiles, counts) + (entries.indices.long() & 0xFFFF), entries.values.float()


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


def first_indices(payload: Tensor, segments: Tensor, layout: WireLayout) -> Tensor:
    """Returns where the first entry of each parameter in a payload is: int64 [segments], an element of the parameter.

    Args:
        payload: uint8 [bytes], this rank's own.
        segments: int64 [segments, 5], rows as in SEGMENT_COLUMNS.
        layout: of this payload.
    """
    tiles = div_up_all(segments[:, 3], TILE)
    first = (segments[:, 4].cumsum(0) - segments[:, 4]).to(payload.device)
    first_tile = (tiles.cumsum(0) - tiles).to(payload.device)
    ends = payload[layout.ends : layout.ends + 4 * int(tiles.sum())].view(torch.int32)
    tile = torch.searchsorted(ends, first.to(torch.int32), right=True)
    inside = payload[layout.indices : layout.values].view(torch.int16)[first].long() & 0xFFFF
    return (tile - first_tile) * TILE + inside


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
