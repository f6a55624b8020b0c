"""Slots: where each parameter, or a rank's piece of one, lies in memory; and the gradients that come for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.local import Piece, part_of
from dgc.ops.wire import GROUP, align_up


class Slot(NamedTuple):
    """The place of one parameter, or of the piece of it that this rank holds. Sizes are those of the piece."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides of its gradient; see dense_strides."""
    dtype: torch.dtype
    """Type of its gradient."""
    numel: int
    offset: int
    """Its first element in the flat tensors of Memory."""
    piece: Piece
    """Its place in the whole parameter."""

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient."""
        return self.numel * self.dtype.itemsize

    @property
    def whole_rows(self) -> int:
        """Rows of the whole parameter: its first dimension, 1 without one."""
        if not self.shape:
            return 1
        return self.shape[0] if self.numel == self.piece.whole else self.piece.whole // math.prod(self.shape[1:])

    @property
    def span(self) -> tuple[int, int]:
        """Begin and end in the flat tensors of Memory."""
        return self.offset, self.offset + self.numel

    def view(self, flat: Tensor) -> Tensor:
        """Returns the slot's part of a flat tensor, as a view in the slot's shape."""
        return flat.as_strided(self.shape, self.strides, self.offset)

    def part(self, whole: Tensor) -> Tensor:
        """Returns the slot's rows of a tensor of the whole parameter; a tensor of these rows alone as it is."""
        if self.numel == self.piece.whole or tuple(whole.shape) == self.shape:
            return whole
        row = self.piece.whole // whole.shape[0]
        return whole.narrow(0, self.piece.begin // row, self.shape[0])


class Gradients(NamedTuple):
    """One bucket of gradients, as a framework passes it. The reduced gradients replace them in place."""

    slots: Sequence[Slot]
    buffers: list[Tensor]
    """Contiguous tensors that hold the gradients: DDP's one bucket, or Horovod's tensor for each parameter."""
    places: Sequence[tuple[int, int]]
    """For each slot, the index of its buffer, and that of its first element there."""

    def whole(self, index: int) -> Tensor:
        """Returns the gradient of one whole parameter, flat, where a slot is a part of it."""
        source, offset = self.places[index]
        return self.buffers[source].view(-1)[offset : offset + self.slots[index].piece.whole]

    def of(self, index: int) -> Tensor:
        """Returns the gradient of one slot, flat, in the order of its memory."""
        source, offset = self.places[index]
        return self.buffers[source].view(-1)[offset : offset + self.slots[index].numel]


def lay_out(
    parameters: Mapping[str, Tensor], compressed: Sequence[str], place: int = 0, places: int = 1
) -> dict[str, Slot]:
    """Returns a slot for each parameter, in their order; the compressed ones lie first in memory.

    Args:
        parameters: by name.
        compressed: the names of those that have a residual.
        place: of this rank, among those that divide the compressed ones.
        places: their number.
    """
    offsets: dict[str, int] = {}
    end = 0
    divided = set(compressed) if places > 1 else set()
    parts = {name: part_of(p, place, places) if name in divided else part_of(p, 0, 1) for name, p in parameters.items()}
    for name in (*compressed, *(name for name in parameters if name not in set(compressed))):
        offsets[name] = end
        end = align_up(end + parts[name][0].numel(), GROUP)
    return {
        name: Slot(
            name,
            shape=tuple(part.shape),
            strides=dense_strides(part),
            dtype=part.dtype,
            numel=part.numel(),
            offset=offsets[name],
            piece=piece,
        )
        for name, (part, piece) in parts.items()
    }


def laid_out_again(slot: Slot, parameter: Tensor) -> Slot:
    """Returns the slot of a parameter whose memory format has changed, as by model.to(memory_format=...)."""
    strides = dense_strides(parameter)
    if slot.numel < slot.piece.whole and not by_rows(parameter):
        raise ValueError(
            f"{slot.name}: expected a memory format in which the first dimension is the outermost, got strides "
            f"{strides}: the ranks of a node divide it by rows"
        )
    return slot._replace(strides=strides)


def by_rows(parameter: Tensor) -> bool:
    """Returns whether each row of a parameter, along its first dimension, is one stretch of memory."""
    strides = [stride for stride, size in zip(dense_strides(parameter), parameter.shape, strict=True) if size > 1]
    return parameter.shape[0] == 1 or strides[0] == max(strides)


def dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Returns the strides that DDP gives a parameter's gradient: the parameter's if it has no gaps, else contiguous."""
    strides = [(stride, size) for stride, size in zip(parameter.stride(), parameter.shape, strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return parameter.stride()


def has_strides(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Returns whether a tensor has these strides; those of dimensions of size 1 are ignored."""
    return all(n <= 1 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))
