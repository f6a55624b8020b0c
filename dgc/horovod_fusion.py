"""Fusion: the groups of gradients that travel together in Horovod, and their state in a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from horovod.common.util import split_list
from torch import Tensor
from torch.futures import Future

from . import fusion
from .state import DGCState


def fuse(
    parameters: Sequence[Tensor], groups: int | list[list[Tensor]] | None, bucket_cap_mb: float
) -> list[list[Tensor]]:
    """Returns the groups of parameters that travel together.

    Args:
        parameters: all trainable ones, in the order of the model.
        groups: the number of groups; or the groups themselves, with each other parameter in a group of its own; or None
            for groups of bucket_cap_mb, filled from the last parameter to the first, since gradients come in about that
            order.
        bucket_cap_mb: MiB of gradients in a group.
    """
    if isinstance(groups, int):
        chosen = split_list(list(parameters), groups)
    elif groups is not None:
        known, grouped = set(map(id, parameters)), {id(p) for group in groups for p in group}
        chosen = [[p for p in group if id(p) in known] for group in groups]
        chosen += [[p] for p in parameters if id(p) not in grouped]
    else:
        return fusion.by_size(parameters[::-1], bucket_cap_mb)  # gradients come in about that order
    return fusion.limited(chosen)


class Fusion:
    """Collects the gradients of a backward pass, and passes each group to DGCState when it is complete."""

    def __init__(self, state: DGCState, groups: Sequence[Sequence[Tensor]]) -> None:
        self._state = state
        self._groups = groups
        # The ranks of a node wait for one group before they start the next: in the order of the groups, on all alike.
        self._in_order = state.exchange.topology.places > 1
        self._group_of = {p: i for i, group in enumerate(groups) for p in group}
        self._sent: dict[int, tuple[Future[Tensor], dict[Tensor, Tensor]]] = {}
        """The future of each group's reduction and the group's gradients, by the group's index."""
        self.reset()

    def reset(self) -> None:
        """Prepares for the first gradient of a backward pass."""
        self._missing = [set(group) for group in self._groups]
        self._left = len(self._groups)

    def forget(self) -> None:
        """Drops the references to gradients, so that zero_grad() can free their memory."""
        self._sent.clear()

    def add(self, p: Tensor) -> Callable[[], Tensor]:
        """Adds a gradient, and sends each group that can go; returns a function that waits for the reduced gradient."""
        index = self._group_of[p]
        self._missing[index].discard(p)
        candidates = range(len(self._groups) - self._left, len(self._groups)) if self._in_order else [index]
        for ready in takewhile(lambda i: not self._missing[i], candidates):
            self._send(ready)

        def reduced() -> Tensor:
            self._state.wait()
            future, gradients = self._sent[index]
            future.wait()
            return gradients[p]  # p.grad may be another tensor by now

        return reduced

    def _send(self, index: int) -> None:
        if self._left == len(self._groups):
            self._state.begin()
        self._left -= 1
        group = self._groups[index]
        future = self._state.reduce(fusion.together(group, [self._state.slot(p) for p in group]))
        self._sent[index] = future, {p: p.grad for p in group if p.grad is not None}
        if self._left == 0:
            self._state.end()
            self.reset()
