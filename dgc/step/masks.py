"""Masks: the weights that are alive, and what is forgotten of the others."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.exchange.base import Exchange
from dgc.local import crc32, local, mesh_of
from dgc.memory.memory import Memory
from dgc.memory.slots import Gradients, Slot
from dgc.optim.base import Rule

WAYS = 64
"""Parts into which a stretch is divided to find the first place where masks differ."""


class Forgotten(NamedTuple):
    """What one rank has dropped of a parameter."""

    name: str
    entries: int
    """Entries of which anything was dropped that was not zero."""
    norms: dict[str, float]
    """Euclidean norm of what was dropped, by kind: "residual", "momentum" and so on."""

    def __str__(self) -> str:
        """Returns the line for the log."""
        norms = ", ".join(f"{kind} of norm {norm:.4g}" for kind, norm in self.norms.items()) or "nothing"
        return f"dgc: {self.name}: forgot {self.entries:,} entries that were not zero: {norms}"


def checked(name: str, mask: object, shape: torch.Size) -> Tensor:
    """Returns a mask of a whole parameter as bool.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape, values other than 0 and 1, or is sharded.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask of {name}: expected a tensor of {tuple(shape)}, got {type(mask).__name__}")
    if mesh_of(mask) is not None:
        raise ValueError(
            f"mask of {name}: expected a plain tensor of the whole parameter, of which each rank takes its rows, got a "
            "DTensor: pass mask.full_tensor(), called on all ranks"
        )
    if mask.shape != shape:
        raise ValueError(f"mask of {name}: expected the parameter's shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask of {name}: expected True and False, or 1 and 0, got other values: write scores > limit")
    return mask.detach().bool()


def forget(memory: Memory, rule: Rule, parameter: Tensor, slot: Slot, dead: Tensor) -> Forgotten:
    """Sets to zero what a rank has accumulated for the dead entries of a parameter, and returns what that was.

    Statistics of the gradients (Rule.averages) stay: they only divide, and cannot begin at zero.

    Args:
        memory: v and the rule's tensors.
        rule: the optimizer's.
        parameter: the whole one.
        slot: where it lies.
        dead: bool, of the slot's shape.
    """
    residual = memory.residual_of(slot.name)
    kept = {} if residual is None else {"residual": residual}
    kept |= {kind: view for kind, view in memory.of(slot.name).items() if kind not in rule.averages}
    beside = {kind: slot.part(local(t)) for kind, t in rule.beside(parameter).items()}
    dropped = torch.zeros_like(dead)
    norms = {}
    for kind, tensor in {**kept, **beside}.items():
        part = torch.where(dead, tensor, 0)
        if part.any():
            dropped |= part != 0
            norms[kind] = float(torch.linalg.vector_norm(part, dtype=torch.float64))
            tensor.masked_fill_(dead, 0)
    return Forgotten(slot.name, int(dropped.sum()), norms)


class Masks:
    """The dead entries of masked parameters, by name."""

    def __init__(self) -> None:
        """Masks nothing."""
        self.dead: dict[str, Tensor] = {}
        """bool, in the shape of the slot: True for each entry that is dead."""
        self._flat: dict[str, tuple[Slot, Tensor]] = {}

    def __bool__(self) -> bool:
        """Returns whether any parameter is masked."""
        return bool(self.dead)

    def set(self, name: str, dead: Tensor | None) -> None:
        """Masks a parameter; None takes its mask off."""
        self.dead.pop(name, None)
        self._flat.pop(name, None)
        if dead is not None:
            self.dead[name] = dead

    def silence(self, gradients: Gradients, dense: Collection[str]) -> None:
        """Sets the gradients of dead entries to zero, in a bucket, but for the parameters that are sent dense."""
        for i, slot in enumerate(gradients.slots):
            if slot.name in self.dead and slot.name not in dense:
                gradients.of(i).masked_fill_(self._in_memory_order(slot), 0)

    def _in_memory_order(self, slot: Slot) -> Tensor:
        known = self._flat.get(slot.name)
        if known is None or known[0] != slot:  # its memory format may have changed
            dead = self.dead[slot.name]
            laid = torch.empty_strided(slot.shape, slot.strides, dtype=torch.bool, device=dead.device).copy_(dead)
            known = self._flat[slot.name] = slot, laid.as_strided((slot.numel,), (1,))
        return known[1]


def agree(exchange: Exchange, name: str, mask: Tensor | None) -> None:
    """Compares a mask with those of the other ranks; a collective.

    Args:
        exchange: the collectives.
        name: of the parameter.
        mask: bool, of the whole parameter; None to take it off.

    Raises:
        ValueError: on every rank, with the first place where they differ.
    """
    everyone = [json.loads(one) for one in exchange.everyone(json.dumps([name, None if mask is None else crc32(mask)]))]
    if others := [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]:
        what = "another mask"
        if mask is not None and all(one[0] == name and one[1] is not None for one in everyone):
            place, values = _first_difference(exchange, mask)
            what = f"another value at {place}: {', '.join(map(str, values))} on ranks 0 to {len(values) - 1}"
        elif any(one[0] != name for one in everyone):
            what = f"one for {everyone[others[0]][0]}"
        raise ValueError(
            f"mask of {name}: expected the same on all ranks, got {what} on rank {others[0]} than on rank 0. "
            "Replicas would part. Make it of what is equal everywhere (weights, averaged gradients, a common seed), or "
            "broadcast it from rank 0; nothing has changed"
        )


def _first_difference(exchange: Exchange, mask: Tensor) -> tuple[tuple[int, ...], list[bool]]:
    """Returns the first place where masks differ, and each rank's value there; each round divides a stretch by WAYS."""
    flat = mask.reshape(-1)
    begin, end = 0, flat.numel()
    while end - begin > 1:
        each = -(-(end - begin) // WAYS)
        mine = [crc32(flat[at : min(end, at + each)]) for at in range(begin, end, each)]
        everyone = [json.loads(one) for one in exchange.everyone(json.dumps(mine))]
        first = next(i for i in range(len(mine)) if any(one[i] != everyone[0][i] for one in everyone))
        begin, end = begin + first * each, min(end, begin + (first + 1) * each)
    values = [one == "True" for one in exchange.everyone(str(bool(flat[begin])))]
    place = torch.unravel_index(torch.tensor(begin), mask.shape)
    return tuple(int(i) for i in place), values
