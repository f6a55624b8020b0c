"""The entries that a bucket's selection holds: where the sections of its bytes are, and what they say.

A selection is what dgc::compress_ writes and dgc::unpack reads; wire.py has its layout. It does not travel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .segments import Segments
from .wire import TILE


class Entries(NamedTuple):
    """The sections of a selection behind its header and its marks: views, to be read and written."""

    ends: Tensor
    """int32 [tiles]: entries of the bucket up to and including each tile."""
    indices: Tensor
    """int16 [entries], unsigned in truth: elements inside their tile, rising."""
    values: Tensor
    """[entries], in the selection's type."""


def entries_of(selection: Tensor, segments: Segments, dtype: torch.dtype) -> Entries:
    """Returns the sections of a selection.

    Args:
        selection: uint8 [bytes].
        segments: of its bucket.
        dtype: of its values.
    """
    at = segments.wire(dtype)
    return Entries(
        ends=selection[at.ends : at.ends + 4 * segments.n_tiles].view(torch.int32),
        indices=selection[at.indices : at.indices + 2 * segments.n_entries].view(torch.int16),
        values=selection[at.values : at.values + dtype.itemsize * segments.n_entries].view(dtype),
    )


def values_of_all(selections: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    """Returns the values of all ranks' selections, [rows, entries] in their type.

    Args:
        selections: uint8 [rows, bytes].
        segments: of their bucket.
        dtype: of the values.
    """
    at = segments.wire(dtype).values
    return selections[:, at : at + dtype.itemsize * segments.n_entries].view(dtype)


def positions(selection: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns where a selection's entries stand in the flat tensors of memory, int64 [entries], and their values.

    Args:
        selection: uint8 [bytes], this rank's own.
        segments: of its bucket.
        dtype: of its values.
    """
    entries = entries_of(selection, segments, dtype)
    begin = segments.column("tile_state", selection.device)
    counts = entries.ends.diff(prepend=entries.ends.new_zeros(1)).long()
    tiles = torch.repeat_interleave(begin, counts, output_size=segments.n_entries)
    return tiles + (entries.indices.long() & 0xFFFF), entries.values.float()


def first_indices(selection: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    """Returns where the first entry of each parameter in a selection is: int64 [segments], an element of the parameter.

    Args:
        selection: uint8 [bytes], this rank's own.
        segments: of its bucket.
        dtype: of its values.
    """
    entries = entries_of(selection, segments, dtype)
    first = segments.column("first_entry", selection.device)
    first_tile = segments.column("first_tile", selection.device)
    tile = torch.searchsorted(entries.ends, first.to(torch.int32), right=True)
    inside = entries.indices[first].long() & 0xFFFF
    return (tile - first_tile) * TILE + inside
