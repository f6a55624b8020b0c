"""Exchange: how ranks talk, and Topology: what counts the ranks in each formula."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.futures import Future


class Topology(NamedTuple):
    """The numbers that "world size" stands for; all the same where every rank sends a payload of its own.

    Where several ranks share one, as the GPUs of a node whose gradients are summed first, they differ.
    """

    rank: int
    """This process, among all that exchange."""
    ranks: int
    """Processes that exchange."""
    row: int
    """This rank's payload among those that are gathered."""
    rows: int
    """Payloads that are gathered: the receive's size, and the break-even with a ring all-reduce over so many."""
    averaged: int
    """Gradients whose mean is the update: what a sum is divided by."""
    workers: int
    """Gradients that are clipped each by itself: N of the clipping threshold's sqrt(N)."""
    share: int
    """This rank's residual, among those that differ."""
    shares: int
    """Residuals that differ: into how many shares what waits is divided."""

    @classmethod
    def flat(cls, rank: int, ranks: int) -> Topology:
        """Returns that of ranks which all send a payload of their own."""
        return cls(
            rank=rank, ranks=ranks, row=rank, rows=ranks, averaged=ranks, workers=ranks, share=rank, shares=ranks
        )


class Transfer(Protocol):
    """The collectives of one bucket, under way."""

    @property
    def done(self) -> Future[Any]:
        """The future that completes when all collectives have, or one has failed; on a GPU perhaps before."""

    def arrived(self) -> AbstractContextManager[None]:
        """Surrounds the work on what has been received, in a callback of `done`.

        Raises:
            RuntimeError: a collective failed; its buffers hold nothing of worth.
        """


class Exchange(ABC):
    """What DGCState asks of a framework's collectives.

    Attributes:
        rank: of this process, among those that exchange.
        world_size: how many these are.
        reducible: types that the all-reduce takes; gradients of another travel as float32.
        go_on: what to do after a backward pass that broke off, for messages.
        changed: whether ranks, or the group, may be others than when refresh() was called last. DGCState agrees with
            the other ranks at the beginning of the next backward pass then, and not already when it is made.
    """

    rank: int
    world_size: int
    reducible: Collection[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    go_on = "Call state.discard(drop_gradient=False) and zero_grad(); or restart from a checkpoint"
    changed = False

    @property
    def topology(self) -> Topology:
        """What counts the ranks; an exchange in stages says here how its ranks share payloads."""
        return Topology.flat(self.rank, self.world_size)

    @abstractmethod
    def refresh(self) -> None:
        """Looks again which rank this is, and of how many."""

    def roll_back(self, rank: int, world_size: int) -> None:
        """Returns to an earlier group, until refresh() looks again."""
        self.rank, self.world_size = rank, world_size

    def future(self) -> Future[Tensor]:
        """Returns a future for a reduced tensor."""
        return Future()

    def gather_in(self, buffers: Sequence[Tensor]) -> None:  # noqa: B027  (nothing is what a flat exchange does)
        """Replaces gradients by the mean over the ranks that share a payload, before they are compressed; in place.

        On a GPU it is queued on the current stream, and the host goes on. Every rank calls it for the same buckets in
        the same order. Nothing where each rank has a payload of its own.

        Args:
            buffers: of one bucket, contiguous.
        """

    @abstractmethod
    def start(self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None) -> Transfer:
        """Starts the all-gather of a payload and the averaging of dense gradients; either may be missing.

        Every rank must call this for the same buckets in the same order, from inside the hook: a collective started
        in a callback could meet another rank's next one.

        Args:
            name: the bucket's, the same on all ranks.
            payload: uint8 [bytes], this rank's.
            gathered: uint8 [topology.rows, bytes], receives all.
            dense: any type of `reducible`, averaged in place.
        """

    def finish(self) -> None:
        """Completes all that has been started, where no thread of the framework does that by itself."""
        return

    @abstractmethod
    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, in their order; a collective."""

    @abstractmethod
    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies one rank's tensors, contiguous, to all others; a collective."""

    def agree(self, mine: Mapping[str, object]) -> None:
        """Compares a description of this rank's set-up with all others'; a collective.

        Raises:
            ValueError: on every rank, naming what differs and where.
        """
        everyone = [json.loads(text) for text in self.everyone(json.dumps({k: repr(v) for k, v in mine.items()}))]
        wrong = [
            f"{key}: rank 0 has {everyone[0].get(key)}, rank {rank} has {other.get(key)}"
            for rank, other in enumerate(everyone)
            for key in dict.fromkeys([*everyone[0], *other])
            if everyone[0].get(key) != other.get(key)
        ]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise ValueError(
                "DGCState: expected the same configuration and parameters on all ranks, but "
                + "; ".join(wrong[:5])
                + more
            )
