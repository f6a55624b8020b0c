"""Slots: where each parameter, or a rank's piece of one, lies in memory; and the gradients that come for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.local import Piece, local, piece_of
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
    def span(self) -> tuple[int, int]:
        """Begin and end in the flat tensors of Memory."""
        return self.offset, self.offset + self.numel

    def view(self, flat: Tensor) -> Tensor:
        """Returns the slot's part of a flat tensor, as a view in the slot's shape."""
        return flat.as_strided(self.shape, self.strides, self.offset)


class Gradients(NamedTuple):
    """One bucket of gradients, as a framework passes it. The reduced gradients replace them in place."""

    slots: Sequence[Slot]
    buffers: list[Tensor]
    """Contiguous tensors that hold the gradients: DDP's one bucket, or Horovod's tensor for each parameter."""
    places: Sequence[tuple[int, int]]
    """For each slot, the index of its buffer, and that of its first element there."""

    def of(self, index: int) -> Tensor:
        """Returns the gradient of one slot, flat, in the order of its memory."""
        source, offset = self.places[index]
        return self.buffers[source].view(-1)[offset : offset + self.slots[index].numel]


def lay_out(parameters: Mapping[str, Tensor], compressed: Sequence[str]) -> dict[str, Slot]:
    """Returns a slot for each parameter, in their order; the compressed ones lie first in memory.

    Args:
        parameters: by name.
        compressed: the names of those that have a residual.
    """
    offsets: dict[str, int] = {}
    end = 0
    parts = {name: local(p) for name, p in parameters.items()}
    for name in (*compressed, *(name for name in parameters if name not in set(compressed))):
        offsets[name] = end
        end = align_up(end + parts[name].numel(), GROUP)
    return {
        name: Slot(
            name,
            shape=tuple(part.shape),
            strides=dense_strides(part),
            dtype=part.dtype,
            numel=part.numel(),
            offset=offsets[name],
            piece=piece_of(parameters[name]),
        )
        for name, part in parts.items()
    }


def laid_out_again(slot: Slot, parameter: Tensor) -> Slot:
    """Returns the slot of a parameter whose memory format has changed, as by model.to(memory_format=...)."""
    return slot._replace(strides=dense_strides(local(parameter)))


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
