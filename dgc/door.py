"""The door where autograd leaves gradients, in .grad: for FSDP2, for models without DDP, and for exchange in step().

A hook of each parameter passes its gradient on when it is complete. Groups of gradients are compressed and sent while
the backward pass goes on, and the pass waits for the last of them before it returns.

On a GPU, FSDP2 runs the hooks on the stream on which it has reduced the gradients, one for the whole model.
Compression is queued there, and so comes after them. The end of the pass makes the stream of the backward pass wait for
all results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.futures import Future

from . import fusion
from .exchange.base import Exchange
from .local import crc32, local
from .memory.slots import Gradients, Slot
from .optim.apply import all_zero

BUCKET_CAP_MB = 25.0
"""MiB of gradients that travel together, as in DistributedDataParallel."""


class Reducer(Protocol):
    """The part of DGCState that the door uses."""

    @property
    def exchange(self) -> Exchange:
        """The collectives of the ranks."""

    def slot(self, parameter: Tensor) -> Slot:
        """Returns where a parameter lies in memory."""

    def begin(self, shadow: bool = False) -> None:
        """Begins a backward pass."""

    def reduce(self, gradients: Gradients) -> Future[Tensor]:
        """Reduces one bucket of gradients in place."""

    def end(self) -> None:
        """Ends a backward pass."""


class Door:
    """Passes the gradients of some parameters to a DGCState, in the same groups and order on all ranks."""

    def __init__(self, state: Reducer, parameters: Mapping[str, Tensor], in_step: bool) -> None:
        """Registers a hook on each parameter, unless gradients are exchanged in step() only.

        Args:
            state: the one that reduces.
            parameters: all trainable ones, by name, in the order of the model.
            in_step: whether step() alone exchanges gradients, by collect().

        Raises:
            ValueError: a parameter has a door to another DGCState.
        """
        if taken := [name for name, p in parameters.items() if has_door(p)]:
            raise ValueError(
                f"register: expected parameters without a DGCState, got {', '.join(taken[:5])}, which have one that is "
                "registered: one DGCState serves a model. Build the model anew to start again"
            )
        self._state = state
        self._parameters = dict(parameters)
        self._group([*parameters.values()][::-1])
        self._order: dict[str, None] | None = {}
        """Names in the order in which gradients have come in the first pass; None once groups go by it."""
        self._closed = self.in_step = in_step
        self._pass: int | None = None
        self._missing: list[set[Tensor]] = []
        self.without: frozenset[str] = frozenset()
        """Names of the parameters that got no gradient in the last pass."""
        self._ahead = False  # whether send() was called, and collect() is still to come
        self._sent: list[Future[Tensor]] = []
        hooked = [] if in_step else parameters.values()
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in hooked]

    def close(self) -> None:
        """Removes the hooks: gradients of later passes stay this rank's own."""
        self._closed = True
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Leaves the gradients of backward passes in its body where they are, to be added up."""
        before, self._closed = self._closed, True
        try:
            yield
        finally:
            self._closed = before

    def broadcast(self, model: nn.Module, exchange: Exchange) -> None:
        """Copies parameters and buffers from rank 0 to all others, as DDP does when it is made; a collective."""
        for tensor in [*model.parameters(), *model.buffers()]:
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            exchange.broadcast_to_all([copy])
            with torch.no_grad():
                tensor.copy_(copy)

    def send(self, exchange: Exchange) -> None:
        """Starts the exchange of the present gradients, if any rank has one other than zero; collect() waits for it."""
        mine = not all_zero(self._parameters.values())
        if "True" in exchange.everyone(str(mine)):
            self._begin()
            while len(self._sent) < len(self._groups):
                self._send()
        self._ahead = True

    def collect(self, exchange: Exchange) -> None:
        """Exchanges the present gradients in place, if step() is to do that and any rank has one other than zero."""
        if not self.in_step:
            return
        if not self._ahead:
            self.send(exchange)
        self._ahead = False
        self._wait()

    def _group(self, order: Sequence[Tensor]) -> None:
        self._groups = fusion.by_size(order, BUCKET_CAP_MB)
        self._group_of = {p: i for i, group in enumerate(self._groups) for p in group}

    def _begin(self) -> None:
        if self._order and len(self._order) >= len(self._parameters) and not self.in_step:
            # As DDP does: after the first pass groups go by the order in which gradients come, that of rank 0.
            (first, *_) = self._state.exchange.everyone(json.dumps([*self._order]))
            self._group([self._parameters[name] for name in json.loads(first)])
            self._order = None
        self._sent, self._missing = [], [set(group) for group in self._groups]
        self._state.begin()

    def _arrived(self, p: Tensor) -> None:
        if self._closed:
            return
        # A pass that broke off leaves its groups behind, and begin() says so.
        if (now := torch._C._current_graph_task_id()) != self._pass:
            self._begin()
            self._pass = now
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._missing[self._group_of[p]].discard(p)
        if self._order is not None:
            self._order[self._state.slot(p).name] = None
        # In the order of the groups, on all ranks alike, whatever the order in which they are complete.
        while len(self._sent) < len(self._groups) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        group = self._groups[len(self._sent)]
        self._sent.append(self._state.reduce(fusion.together(group, [self._state.slot(p) for p in group])))
        if len(self._sent) == len(self._groups):
            self._state.end()

    def _finish(self) -> None:
        """Sends the groups in which gradients are missing, and waits for all results."""
        self._pass = None
        if self._order is not None:
            self._order.update(dict.fromkeys(self._parameters))
        late = self._missing[len(self._sent) :]
        self.without = frozenset(self._state.slot(p).name for missing in late for p in missing)
        while len(self._sent) < len(self._groups):
            self._send()
        self._wait()

    def _wait(self) -> None:
        """Waits for all results."""
        sent, self._sent = self._sent, []
        for future in sent:
            future.wait()


def check_weights(parameters: Mapping[str, Tensor], exchange: Exchange) -> None:
    """Compares the weights of all ranks that hold the same ones, which nothing makes equal; a collective.

    Raises:
        ValueError: they differ.
    """
    mine = json.dumps({name: crc32(local(p)) for name, p in parameters.items()})
    places = exchange.topology.places
    everyone = exchange.everyone(mine)
    # All ranks raise, also those whose own shard is equal everywhere.
    if wrong := [rank for rank, theirs in enumerate(everyone) if theirs != everyone[rank % places]]:
        ours, theirs = (json.loads(everyone[rank]) for rank in (wrong[0] % places, wrong[0]))
        names = [name for name in ours if ours[name] != theirs[name]]
        raise ValueError(
            f"register: expected equal weights on all ranks (FSDP2: in all nodes), got others on rank {wrong[0]} than "
            f"on the first: {', '.join(names[:5])}. Nothing broadcasts them here. Seed all ranks alike, load the "
            "same checkpoint, or broadcast them before"
        )


def has_door(p: Tensor) -> bool:
    """Returns whether gradients of a parameter are passed on in the backward pass."""
    hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(getattr(hook, "__self__", None), Door) for hook in hooks.values())
