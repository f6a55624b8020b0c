"""The exchange between islands over Horovod: a process set across nodes, and one inside each."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import horovod.torch as hvd
import torch
from horovod.torch.mpi_ops import _basics
from torch import Tensor

from .base import Islands
from .horovod import HorovodExchange, HorovodTransfer, broadcast_in, everyone_of

Nodes = Literal["auto"] | tuple[Any, Any]  # nodes are hosts; or process sets, of this node and of the same place
Ranks = tuple[int, ...]

logger = logging.getLogger("dgc")


class HorovodIslands(Islands, HorovodExchange):
    """The exchange of one shard between nodes.

    A wait for a collective is one of the host, on a GPU too. Horovod runs the collectives of all process sets in a
    thread of its own, set after set in one order on all ranks, so that none of them holds up another in a circle. But
    the ranks of a node wait for one before they start the next, and so have to start them in one order: see Fusion.

    Attributes:
        process_set: the ranks that hold the same shard, one of each node.
        node: the ranks of this node.
    """

    def __init__(
        self,
        device: torch.device,
        node: Any,
        across: Any,
        predivide_factor: float = 1.0,
        agreed: Mapping[str, object] | None = None,
    ) -> None:
        """Takes both process sets for good, which sets_of() has checked; a collective. See HorovodExchange."""
        self.node = node
        super().__init__(device, across, predivide_factor, agreed)
        self.look_for_swapped_dimensions()

    def _place(self) -> tuple[int, int]:
        self.row, self.rows = super()._place()
        self.place, self.places = self.node.rank(), self.node.size()
        return self.row * self.places + self.place, self.rows * self.places

    def mean_in_node(self, name: str, parts: Tensor, mean: Tensor) -> Callable[[], None]:
        """Starts the mean of all ranks' parts for this rank; see Islands."""
        places, half = len(parts), mean.dtype == torch.float16
        if half:
            parts /= places  # before the sum, which would overflow
        # As bytes, since Horovod's torch adapter has no bfloat16; and this adds in the order of the ranks.
        sent = parts.view(torch.uint8)
        received = torch.empty_like(sent)
        handle = hvd.alltoall_async(sent, name=f"dgc.scatter.{name}", process_set=self.node)
        wait = self._started(handle, received)

        def finish() -> None:
            wait()
            torch.sum(received.view(mean.dtype), 0, out=mean)
            if not half:
                mean.div_(places)

        return finish

    def gather_in_node(self, name: str, own: Tensor) -> Callable[[], Tensor]:
        """Starts an all-gather inside the node; see Islands."""
        gathered = own.new_empty(self.places, len(own))
        wait = self._started(hvd.allgather_async(own, name=f"dgc.gather.{name}", process_set=self.node), gathered)

        def finish() -> Tensor:
            wait()
            return gathered

        return finish

    def sum_in_node(self, tensor: Tensor) -> None:
        """Sums a tensor in place over the ranks of this node; a collective of the node."""
        name = f"dgc.sum.{tensor.dtype}.{tensor.numel()}"  # Horovod remembers type and size of a name
        self._started(hvd.allreduce_async_(tensor.view(-1), name=name, op=hvd.Sum, process_set=self.node))()

    def _started(self, handle: int, received: Tensor | None = None) -> Callable[[], None]:
        """Returns a function that waits for a collective. finish() does so where a pass breaks off before."""
        transfer = HorovodTransfer()
        transfer.add(handle, received)
        self._under_way.append(transfer)

        def wait() -> None:
            self._under_way.remove(transfer)
            transfer.finish()
            with transfer.arrived():
                return

        return wait

    def everyone_in_node(self, text: str) -> list[str]:
        """Returns the texts of this node's ranks; a collective of the node."""
        return everyone_of(self.node, text)

    def everyone_across(self, text: str) -> list[str]:
        """Returns the texts of the ranks that hold the same shard, node after node; a collective of these."""
        return everyone_of(self.process_set, text)

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies the tensors of a node, that of rank `root`, to the same places of all other nodes; a collective."""
        broadcast_in(self.process_set, tensors, root // self.places)

    def broadcast_to_all(self, tensors: Sequence[Tensor]) -> None:
        """Copies the first rank's tensors to all ranks of all nodes; a collective."""
        self.broadcast(tensors, root=0)
        broadcast_in(self.node, tensors, root=0)


def exchange_of(
    device: torch.device,
    process_set: Any,
    nodes: Nodes | None,
    predivide_factor: float,
    agreed: Mapping[str, object],
) -> HorovodExchange:
    """Returns the exchange between nodes, or between ranks that are a worker each; a collective, unless elastic.

    Args:
        device: the device of all tensors that are exchanged.
        process_set: the ranks that exchange.
        nodes: which of them are a node; None for none.
        predivide_factor: see HorovodExchange.
        agreed: see HorovodExchange.

    Raises:
        ValueError: nodes in an elastic run or in a process set; or as sets_of().
    """
    flat = HorovodExchange(device, process_set, predivide_factor, agreed)
    if nodes is not None:
        _check(nodes, flat)
    if flat.elastic or flat.world_size == 1:
        return flat  # a newcomer's others train meanwhile, and compare later
    sets = sets_of(nodes, flat)
    return flat if sets is None else HorovodIslands(device, *sets, predivide_factor, agreed)


def _check(nodes: Nodes, flat: HorovodExchange) -> None:
    if flat.elastic:
        raise ValueError(
            "nodes: expected None in an elastic run, since Horovod forgets process sets when workers come or go, and a "
            "worker that dies takes its rows of the node's residual along. Leave nodes out, or start without elastic"
        )
    if flat.process_set is not hvd.global_process_set:
        raise ValueError(f"process_set: expected the global one with nodes, got {flat.process_set}")
    if nodes == "auto":
        return
    if not (isinstance(nodes, tuple) and len(nodes) == 2 and all(isinstance(one, hvd.ProcessSet) for one in nodes)):
        raise ValueError(
            f'nodes: expected "auto", or two process sets (of this node, of the same place in all nodes), got {nodes!r}'
        )
    if missing := [str(one) for one in nodes if one.process_set_id is None]:
        raise ValueError(
            f"nodes: expected registered process sets, got {', '.join(missing)}. Every process has to pass those of "
            "all nodes to hvd.init(process_sets=[...]), or to hvd.add_process_set(), in one order"
        )


def sets_of(nodes: Nodes | None, flat: HorovodExchange) -> tuple[Any, Any] | None:
    """Returns the process sets of this node, and of the same place in all nodes; None where each rank is a worker.

    Args:
        nodes: which ranks are a node; None for none.
        flat: between all ranks, whose collective this is.

    Raises:
        ValueError: ranks differ in nodes, which are of several sizes or do not fit together; or Horovod cannot register
            the process sets of "auto".
    """
    mine: list[object] = ["None"]
    if nodes is not None:
        mine = (
            ['"auto"', hvd.cross_rank()] if nodes == "auto" else ["process sets", *(list(one.ranks) for one in nodes)]
        )
    everyone = [json.loads(text) for text in flat.everyone(json.dumps(mine))]
    if len({kind for kind, *_ in everyone}) > 1:
        got = ", ".join(f"{kind} on rank {rank}" for rank, (kind, *_) in enumerate(everyone[:16]))
        raise ValueError(f"nodes: expected the same on all processes, got {got}")
    if nodes is None:
        return None
    if nodes == "auto":
        hosts: dict[int, list[int]] = {}
        for rank, (_, host) in enumerate(everyone):
            hosts.setdefault(host, []).append(rank)
        inside = [*map(tuple, hosts.values())]
    else:
        inside = sorted({tuple(node) for _, node, _ in everyone})
    own = _grid(inside, flat.world_size)
    if nodes != "auto" and any(own.get(rank) != (tuple(a), tuple(b)) for rank, (_, a, b) in enumerate(everyone)):
        own = {}
    if not own:
        got = ", ".join(f"{sets} on rank {rank}" for rank, (_, *sets) in enumerate(everyone[:16]))
        if nodes == "auto":
            got = " and ".join(str([*node]) for node in inside[:16])
        raise ValueError(
            "nodes: expected nodes of one size that hold all ranks once and in one order, as [0, 1] and [2, 3], with "
            f"the ranks of one place in all of them, as [0, 2] and [1, 3]; got {got} for {flat.world_size} ranks. "
            "Start as many processes on each machine, or leave nodes out"
        )
    node, across = own[flat.rank]
    if len(node) == 1 or len(across) == 1:
        if flat.rank == 0:
            what = "one node" if len(across) == 1 else "one rank a node"
            logger.info("dgc: nodes finds %s: each rank is a worker of its own", what)
        return None
    if nodes != "auto":
        return nodes
    sets = _registered([*inside, *dict.fromkeys(place for _, place in own.values())])
    return sets[node], sets[across]


def _grid(inside: Sequence[Ranks], world_size: int) -> dict[int, tuple[Ranks, Ranks]]:
    """Returns each rank's node, and the ranks of its place in all nodes; nothing where nodes do not fit together."""
    whole = sorted(rank for node in inside for rank in node) == [*range(world_size)]
    if not whole or len({len(node) for node in inside}) > 1:
        return {}
    across = [*zip(*inside, strict=True)]
    if any(ranks != tuple(sorted(ranks)) for ranks in across):
        return {}
    return {rank: (node, across[place]) for node in inside for place, rank in enumerate(node)}


def _registered(wanted: Sequence[Ranks]) -> dict[Ranks, Any]:
    """Returns the process sets of some ranks; registers those that are missing, in one order on all ranks."""
    known = {tuple(ranks): number for number, ranks in _basics._get_process_set_ids_and_ranks().items()}
    sets: dict[Ranks, Any] = {}
    for ranks in wanted:
        sets[ranks] = hvd.ProcessSet(list(ranks))
        if ranks in known:
            sets[ranks].process_set_id = known[ranks]
            continue
        try:
            hvd.add_process_set(sets[ranks])
        except ValueError as error:
            lists = ", ".join(f"hvd.ProcessSet({list(one)})" for one in wanted)
            raise ValueError(
                'nodes: expected a Horovod that adds process sets: write hvd.init(process_sets="dynamic"), or set '
                f"HOROVOD_DYNAMIC_PROCESS_SETS=1, on all processes; or hvd.init(process_sets=[{lists}])"
            ) from error
    return sets
