"""Fusion of gradients that come one by one, each in its parameter's .grad, into groups that travel together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .local import local
from .memory.slots import Gradients, Slot, has_strides

MAX_GROUP = 256
"""Largest number of parameters in a group, since the GPU kernels take no more gradient tensors at once."""


def by_size(parameters: Sequence[Tensor], bucket_cap_mb: float) -> list[list[Tensor]]:
    """Returns groups of a size.

    Args:
        parameters: all trainable ones, in the order in which their gradients come.
        bucket_cap_mb: MiB of gradients in a group.
    """
    groups: list[list[Tensor]] = []
    filling: dict[torch.dtype, tuple[list[Tensor], float]] = {}
    for p in parameters:
        group, filled = filling.get(p.dtype, ([], 0.0))
        nbytes = local(p).nbytes
        if not group or filled + nbytes > bucket_cap_mb * 2**20:
            group, filled = [], 0.0
            groups.append(group)
        group.append(p)
        filling[p.dtype] = group, filled + nbytes
    return limited(groups)


def limited(groups: Iterable[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Returns the groups, with those of more than MAX_GROUP parameters divided."""
    return [list(group[i : i + MAX_GROUP]) for group in groups for i in range(0, len(group), MAX_GROUP)]


def together(group: Sequence[Tensor], slots: Sequence[Slot]) -> Gradients:
    """Returns the gradients of a group; a parameter without one gets zeros, since another rank may have one.

    Raises:
        ValueError: a gradient is sparse.
    """
    flat = [_flat(p, slot) for p, slot in zip(group, slots, strict=True)]
    return Gradients(slots, flat, [(i, 0) for i in range(len(group))])


def _flat(p: Tensor, slot: Slot) -> Tensor:
    """Returns this rank's part of a gradient, flat, in the order of memory; replaces a .grad that has another order."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    if p.grad.is_sparse:
        raise ValueError(
            f"{slot.name}: expected a dense gradient, got a sparse one (nn.Embedding(sparse=True)?): use sparse=False"
        )
    # The slot's strides are those of the whole parameter too, where the ranks of a node divide it.
    if not has_strides(local(p.grad), slot.strides):
        p.grad = torch.empty_strided(p.shape, slot.strides, dtype=p.dtype, device=p.device).copy_(p.grad)
    flat = local(p.grad)
    return flat.as_strided((flat.numel(),), (1,))
