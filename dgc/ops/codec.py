"""Codecs: how a bucket's selected entries become the bytes that travel, and come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from .segments import Segments
from .selection import Entries


class Codec(ABC):
    """Turns entries into bytes whose number density fixes, so that one all-gather without a size exchange carries them.

    Every payload begins with the selection's header and its byte for each parameter, which are not the codec's.

    Attributes:
        name: the same on all ranks; ranks with different codecs refuse each other's payloads.
        dtype: type of the values in a selection: float32, bfloat16 or float16.
        entry_bytes: about how many bytes an entry takes on the wire, for the break-even with a dense all-reduce.
    """

    name: str
    dtype: torch.dtype
    entry_bytes: float

    @abstractmethod
    def nbytes(self, segments: Segments) -> int:
        """Returns the bytes that a bucket's entries take on the wire, header and marks not counted."""

    @abstractmethod
    def encode(self, entries: Entries, segments: Segments, body: Tensor) -> None:
        """Writes entries as bytes.

        Values that lose something are replaced, in `entries`, by what receivers will read: what is lost stays in the
        residual.

        Args:
            entries: this rank's.
            segments: of the bucket.
            body: uint8 [nbytes], to be written.
        """

    @abstractmethod
    def decode(self, body: Tensor, segments: Segments, entries: Entries) -> None:
        """Reads one rank's bytes, whatever they hold.

        What comes out is checked by dgc::unpack as a selection is: number of entries, indices, finite values. Bytes
        that cannot be read become an index that is out of order.
        """


@final
class Plain(Codec):
    """Sends the selection as it is: 16 bits an index, and a value in float32, bfloat16 or float16."""

    # Final, since a bucket whose codec is this one sends the selection without asking it.
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Takes the type of the values."""
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self.entry_bytes = 2 + dtype.itemsize

    def nbytes(self, segments: Segments) -> int:
        """Returns the bytes of a selection behind its header and marks."""
        at = segments.wire(self.dtype)
        return at.nbytes - at.ends

    def encode(self, entries: Entries, segments: Segments, body: Tensor) -> None:
        """Copies nothing: the caller hands the selection itself to the exchange."""

    def decode(self, body: Tensor, segments: Segments, entries: Entries) -> None:
        """Copies nothing: what came is a selection."""


def codec_of(wire_dtype: torch.dtype) -> Codec:
    """Returns the codec that DGCConfig.wire_dtype names."""
    return Plain(wire_dtype)
