"""Pieces: saved parts of parameters, put together for a rank that holds another part than the one that was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .slots import Slot

MOST_ELEMENTS = 2**40
"""Largest parameter that a state_dict may give."""


def pieces_of(slots: Mapping[str, Slot]) -> dict[str, list[int]]:
    """Returns for each parameter the first element of this rank's part and the number of its elements."""
    return {name: [slot.piece.begin, slot.numel] for name, slot in slots.items()}


def check(pieces: object) -> None:
    """Checks the pieces that a state_dict gives.

    Raises:
        ValueError: they are no [begin, number of elements] by name.
    """

    def is_range(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            return False
        return all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in value)

    if not isinstance(pieces, Mapping) or not all(map(is_range, pieces.values())):
        raise ValueError(f"state_dict['pieces']: expected [begin, number of elements] by name, got {pieces!r:.100}")


def fitted(parts: Sequence[Mapping[str, Any]], kinds: Sequence[str], slots: Mapping[str, Slot]) -> Mapping[str, Any]:
    """Returns the state_dict of one share, whose tensors are this rank's parts of the parameters.

    Args:
        parts: the state_dicts in which the share was saved: one, or one for each rank of a node.
        kinds: those of the tensors that are cut anew.
        slots: this rank's parts, by name.

    Raises:
        ValueError: the parts do not have all elements that this rank holds.
    """
    whole = all(slot.numel == slot.piece.whole for slot in slots.values())
    if len(parts) == 1 and (parts[0].get("pieces") or {}) == ({} if whole else pieces_of(slots)):
        return parts[0]
    joined = dict(parts[0])
    for kind in kinds:
        named = [part[kind] if isinstance(part[kind], Mapping) else {} for part in parts]
        saved = [*zip(parts, named, strict=True)]
        joined[kind] = {
            name: _cut([(_begin(part, name, tensors[name], slot), tensors[name]) for part, tensors in saved], slot)
            for name, slot in slots.items()
            if all(isinstance(tensors.get(name), Tensor) for tensors in named)
        }
        joined[kind].update({name: None for tensors in named for name in tensors if name not in slots})
    return joined


def _begin(part: Mapping[str, Any], name: str, tensor: Tensor, slot: Slot) -> int:
    """Returns the first element of a saved tensor in its parameter: 0 where it has all, as weights under DDP do."""
    return 0 if tensor.numel() == slot.piece.whole else int((part.get("pieces") or {}).get(name, [0])[0])


def _cut(saved: Sequence[tuple[int, Tensor]], slot: Slot) -> Tensor:
    """Returns a slot's elements out of saved parts, given with their first element."""
    begin, end = slot.piece.begin, slot.piece.begin + slot.numel
    found, at = [], begin
    for first, tensor in sorted(saved, key=lambda one: one[0]):
        last = min(end, first + tensor.numel())
        if first <= at < last:
            found.append(tensor.reshape(-1)[at - first : last - first])
            at = last
    if at < end:
        raise ValueError(
            f"state_dict: expected elements {begin} to {end} of {slot.name}, which this rank holds, got none from {at} "
            "on. It was saved by another division of the model among ranks: dgc.checkpoint puts the parts together"
        )
    return (torch.cat(found) if found else torch.empty(0)).view(slot.shape)
