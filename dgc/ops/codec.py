"""Codecs: how a bucket's selected entries become the bytes that travel, and come back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from .schema_wire import decode, encode_
from .segments import Segments


class Codec(ABC):
    """Makes a payload of a selection and back; density fixes its size, so that one all-gather carries all of them.

    A selection is what dgc::compress_ writes and dgc::unpack reads (selection.py). Both begin with the same header and
    the same byte for each parameter, up to `Segments.head`.

    Attributes:
        name: the same on all ranks; ranks with different codecs refuse each other's payloads.
        dtype: type of the values in a selection: float32, bfloat16 or float16.
    """

    name: str
    dtype: torch.dtype

    @abstractmethod
    def entry_bytes(self, density: float) -> float:
        """Returns about how many bytes an entry takes on the wire, for the break-even with a dense all-reduce."""

    @abstractmethod
    def nbytes(self, segments: Segments) -> int:
        """Returns the bytes of a bucket's payload, a multiple of 16."""

    @abstractmethod
    def encode(
        self, selection: Tensor, segments: Segments, workspace: Tensor, residual: Tensor, payload: Tensor
    ) -> None:
        """Writes a payload.

        Values that lose something are replaced, in the selection, by what receivers will read, and what is lost goes to
        the residual.

        Args:
            selection: uint8, this rank's.
            segments: of the bucket.
            workspace: of the ops, for these segments.
            residual: v, float32 [elements].
            payload: uint8 [nbytes], to be written.
        """

    @abstractmethod
    def decode(self, payloads: Tensor, segments: Segments, workspace: Tensor, selections: Tensor) -> None:
        """Reads all ranks' payloads, whatever they hold.

        What comes out is checked by dgc::unpack: number of entries, indices, finite values. Bytes that cannot be read
        become an index or a tile end that is out of order.

        Args:
            payloads: uint8 [rows, nbytes].
            segments: of the bucket.
            workspace: of the ops, for these segments.
            selections: uint8 [rows, bytes of a selection], to be written.
        """


@final
class EliasFano(Codec):
    """The wire format of docs/wire.md: indices in Elias-Fano form, values in a floating type or in 8 or 4 bits."""

    def __init__(self, values: torch.dtype | str = torch.float32) -> None:
        """Takes the type of the values on the wire: float32, bfloat16, float16, "8bit" or "4bit"."""
        self.name = str(values).removeprefix("torch.")
        self.dtype = values if isinstance(values, torch.dtype) else torch.float32
        self.value_bits = 8 * values.itemsize if isinstance(values, torch.dtype) else int(values.removesuffix("bit"))

    def entry_bytes(self, density: float) -> float:
        """Returns the bytes of a value and of an index in a large parameter: log2(1 / density) and 1.5 to 2 bits."""
        low = min(int(math.log2(1 / density)), 16)
        return (self.value_bits + low + 1 + 2.0**-low / density) / 8

    def nbytes(self, segments: Segments) -> int:
        """Returns the bytes of a bucket's payload, a multiple of 16."""
        return segments.payload(self.value_bits).nbytes

    def encode(
        self, selection: Tensor, segments: Segments, workspace: Tensor, residual: Tensor, payload: Tensor
    ) -> None:
        """Writes a payload; what 8 and 4 bits lose goes to the residual."""
        encode_(selection, segments.table, workspace, residual, self.dtype, self.value_bits, payload)

    def decode(self, payloads: Tensor, segments: Segments, workspace: Tensor, selections: Tensor) -> None:
        """Reads all ranks' payloads."""
        decode(payloads, segments.table, workspace, self.dtype, self.value_bits, selections)
