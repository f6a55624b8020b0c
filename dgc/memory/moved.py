"""Moves of memory to a model that has changed: by name and shape."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .memory import Memory


def move(old: Memory, new: Memory) -> dict[str, dict[str, Tensor]]:
    """Copies what a memory holds into a new one, by name and shape, and returns copies of what finds no place there.

    Args:
        old: unchanged.
        new: of zeros, with the kinds of the old one.

    Returns:
        By name and kind, those tensors that are not zero.
    """
    left: dict[str, dict[str, Tensor]] = {}
    for name, slot in old.slots.items():
        residual = old.residual_of(name)
        held = {**({} if residual is None else {"residual": residual}), **old.of(name)}
        rest = place(new, name, held) if fits(new, name, slot.shape, slot.piece) else held
        if rest := {kind: tensor.clone() for kind, tensor in rest.items() if tensor.any()}:
            left[name] = rest
        if name in old.diverged and name in new.slots:
            new.diverged.add(name)
    return left


def fits(memory: Memory, name: str, shape: tuple[int, ...], piece: object = None) -> bool:
    """Returns whether a memory has a parameter of a name and shape, and of the same rows where it is divided."""
    slot = memory.slots.get(name)
    return slot is not None and slot.shape == shape and piece in (None, slot.piece)


def place(memory: Memory, name: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds tensors to those of a parameter, by kind, and returns those that it has no place for."""
    rest = {}
    for kind, tensor in held.items():
        target = memory.residual_of(name) if kind == "residual" else memory.of(name).get(kind)
        if target is None:
            rest[kind] = tensor
        else:
            target.add_(tensor.to(target.device))
    return rest


def norm_of(left: Mapping[str, Mapping[str, Tensor]]) -> float:
    """Returns the Euclidean norm of all residuals."""
    norms = [kinds["residual"].double().norm() for kinds in left.values() if "residual" in kinds]
    return float(torch.stack(norms).norm()) if norms else 0.0
