"""Exchange, the collectives of ranks; Islands, those of nodes; and Topology, the number that each formula counts."""

from __future__ import annotations

import json
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.futures import Future

logger = logging.getLogger("dgc")


class Topology(NamedTuple):
    """The numbers of ranks, payloads and residuals, each of which "world size" may stand for.

    All of them are equal where every rank sends a payload of its own. They differ where several ranks share a payload,
    as the GPUs of a node whose gradients are averaged first.
    """

    rank: int
    """Number of this process among all that exchange."""
    ranks: int
    """Number of processes that exchange."""
    row: int
    """Number of this rank's payload among the gathered ones."""
    rows: int
    """Number of gathered payloads: rows of the receive buffer, and N in the break-even with a ring all-reduce."""
    averaged: int
    """Number of gradients whose mean is the update: their sum is so many times the mean."""
    workers: int
    """Number of gradients that are clipped separately: N in the clipping threshold sqrt(N) * clip_norm."""
    share: int
    """Number of this rank's residual among those that differ."""
    shares: int
    """Number of residuals that differ. Their mean is the update that is still to come."""
    place: int = 0
    """Number of this rank's part of the model among those of its node."""
    places: int = 1
    """Number of ranks of a node that hold the model together, each a part of it."""

    @classmethod
    def flat(cls, rank: int, ranks: int) -> Topology:
        """Returns the topology of ranks that each send a payload of their own."""
        return cls(
            rank=rank, ranks=ranks, row=rank, rows=ranks, averaged=ranks, workers=ranks, share=rank, shares=ranks
        )


class Transfer(Protocol):
    """The started collectives of one bucket."""

    @property
    def done(self) -> Future[Any]:
        """The future that completes when all collectives have completed, or one has failed.

        On a GPU it may complete as soon as they are queued; `arrived` then orders the device's work after them.
        """

    def arrived(self) -> AbstractContextManager[None]:
        """Returns the context in which a callback of `done` reads the results.

        Raises:
            RuntimeError: a collective failed; the content of its buffers is undefined.
        """


class Exchange(ABC):
    """The collectives that DGCState needs of a framework.

    Attributes:
        rank: number of this process among all that exchange.
        world_size: number of processes that exchange.
        reducible: dtypes that the all-reduce takes; gradients of another dtype are sent as float32.
        go_on: the remedy for a backward pass that broke off, for messages.
        changed: whether the ranks or their group may have changed since the last refresh(). While it is True, DGCState
            defers the agreement with the other ranks to the next backward pass.
    """

    rank: int
    world_size: int
    reducible: Collection[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    go_on = "Call state.discard(drop_gradient=False) and zero_grad(); or restart from a checkpoint"
    changed = False

    @property
    def topology(self) -> Topology:
        """The numbers of ranks, payloads and residuals. An exchange whose ranks share payloads overrides it."""
        return Topology.flat(self.rank, self.world_size)

    @abstractmethod
    def refresh(self) -> None:
        """Updates rank and world_size to the present group."""

    def roll_back(self, rank: int, world_size: int) -> None:
        """Sets rank and world_size to those of an earlier group, until the next refresh()."""
        self.rank, self.world_size = rank, world_size

    def future(self) -> Future[Tensor]:
        """Returns a future for a reduced tensor."""
        return Future()

    @abstractmethod
    def start(self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None) -> Transfer:
        """Starts the all-gather of a payload and the averaging of dense gradients; either may be missing.

        Every rank must call this for the same buckets in the same order, from inside the hook. A collective that a
        callback starts could be matched with another rank's next one.

        Args:
            name: the bucket's, the same on all ranks.
            payload: uint8 [bytes], this rank's.
            gathered: uint8 [topology.rows, bytes], receives all payloads.
            dense: of a dtype in `reducible`, averaged in place.
        """

    def finish(self) -> None:
        """Completes all started transfers, where no thread of the framework does so."""
        return

    def sum_in_node(self, tensor: Tensor) -> None:  # noqa: B027  (nothing is what ranks that hold the whole model do)
        """Sums a tensor in place over the ranks of a node that hold the model together; a collective of these.

        On a GPU this is queued on the current stream, and the host does not wait.
        """

    def everyone_in_node(self, text: str) -> list[str]:
        """Returns the texts of the ranks of a node that hold the model together; a collective of these."""
        return [text]

    @abstractmethod
    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, in their order; a collective."""

    @abstractmethod
    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies one rank's contiguous tensors to all other ranks; a collective."""

    def broadcast_to_all(self, tensors: Sequence[Tensor]) -> None:
        """Copies rank 0's contiguous tensors to all other ranks, whatever they hold of the model; a collective."""
        self.broadcast(tensors, root=0)

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


class Islands(Exchange):
    """The collectives of nodes whose ranks share the work on one model, each for a shard of it.

    Gradients are averaged inside the node, by FSDP2 or by mean_in_node(), and each rank keeps the average for its
    shard. start() exchanges it among the ranks of equal place in all nodes. So the node, and not the rank, is the
    worker of DGC. What all ranks of a node must do alike, such as leaving a step out, they agree on by sum_in_node()
    and everyone_in_node().

    All ranks of a node call mean_in_node(), gather_in_node() and sum_in_node() in one order.

    Attributes:
        row: number of this node.
        rows: number of nodes.
        place: number of this rank in its node.
        places: number of ranks of a node.
    """

    row: int
    rows: int
    place: int
    places: int

    @property
    def topology(self) -> Topology:
        """One payload, one residual and one gradient for each node."""
        return Topology(
            rank=self.rank,
            ranks=self.world_size,
            row=self.row,
            rows=self.rows,
            averaged=self.rows,
            workers=self.rows,
            share=self.row,
            shares=self.rows,
            place=self.place,
            places=self.places,
        )

    @abstractmethod
    def mean_in_node(self, name: str, parts: Tensor, mean: Tensor) -> Callable[[], None]:
        """Starts the mean of all ranks' parts for this rank; a collective of the node.

        Args:
            name: the bucket's, the same on all ranks.
            parts: [places, elements], one for each rank of the node; overwritten.
            mean: [elements].

        Returns:
            A function that waits for it. It raises RuntimeError where a rank has gone.
        """

    @abstractmethod
    def gather_in_node(self, name: str, own: Tensor) -> Callable[[], Tensor]:
        """Starts an all-gather inside the node.

        Args:
            name: the bucket's, the same on all ranks.
            own: uint8 [bytes], contiguous.

        Returns:
            A function that waits for it, and returns uint8 [places, bytes]. It raises RuntimeError where a rank has
            gone.
        """

    @abstractmethod
    def everyone_across(self, text: str) -> list[str]:
        """Returns the texts of the ranks of equal place, node after node; a collective of these."""

    def look_for_swapped_dimensions(self) -> None:
        """Warns where the ranks of each node are on several machines, and those of a place on one; a collective."""
        host = socket.gethostname()
        inside, across = self.everyone_in_node(host), self.everyone_across(host)
        if self.rank == 0 and len(set(inside)) > 1 and len(set(across)) == 1:
            logger.warning(
                "dgc: a node of ranks on %s averages densely between machines, and ranks on one machine exchange what "
                "is compressed: the dimensions of the mesh, or the two process sets, seem to be swapped. A mesh has "
                "nodes first, (nodes, ranks_of_a_node); nodes=(inside, across) has this node's ranks first",
                ", ".join(dict.fromkeys(inside)),
            )

    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, node after node; a collective of all nodes."""
        columns = [json.loads(column) for column in self.everyone_in_node(json.dumps(self.everyone_across(text)))]
        return [column[row] for row in range(self.rows) for column in columns]
