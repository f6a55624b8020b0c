"""The exchange between islands: nodes whose ranks hold one model together, each a shard of it.

FSDP2 averages gradients inside the node, and leaves each rank the average for its shard. The ranks that hold the same
shard in all nodes exchange it among themselves: the node, and not the rank, is the worker of DGC. What all ranks of a
node must do alike, such as leaving a step out, they agree on inside the node.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Topology
from .distributed import DistributedExchange, everyone_of, failed


class IslandExchange(DistributedExchange):
    """The exchange of one shard between nodes.

    Attributes:
        group: the ranks that hold the same shard, one of each node.
        node: the ranks of this node.
    """

    go_on = "Call state.discard(drop_gradient=False) and zero_grad(); or restart all ranks from a checkpoint"

    def __init__(self, device: torch.device, across: dist.ProcessGroup, node: dist.ProcessGroup) -> None:
        """Takes both groups for good.

        Args:
            device: the device of all tensors that are exchanged.
            across: the ranks that hold the same shard, one of each node.
            node: the ranks of this node.

        Raises:
            ValueError: this process is not in across; or both groups have more ranks in common than this one.
        """
        self.node = node
        super().__init__(device, across)
        if both := sorted(set(self.ranks) & set(dist.get_process_group_ranks(node)) - {dist.get_rank()}):
            raise ValueError(
                f"process_group: expected the ranks that hold the same shard, one of each node, got a group with "
                f"ranks {both} of this rank's own node, which hold other shards. With mesh = init_device_mesh(device, "
                '(nodes, ranks_of_a_node), mesh_dim_names=("replicate", "shard")) and fully_shard(module, '
                'mesh=mesh["shard"]), pass process_group=mesh["replicate"].get_group()'
            )

    def _place(self) -> tuple[int, int]:
        row, rows = super()._place()
        self._row, self._rows = row, rows
        places = dist.get_world_size(self.node)
        return row * places + dist.get_rank(self.node), rows * places

    @property
    def topology(self) -> Topology:
        """One payload, one residual and one gradient for each node."""
        return Topology(
            rank=self.rank,
            ranks=self.world_size,
            row=self._row,
            rows=self._rows,
            averaged=self._rows,
            workers=self._rows,
            share=self._row,
            shares=self._rows,
            place=dist.get_rank(self.node),
            places=dist.get_world_size(self.node),
        )

    @property
    def everyones_group(self) -> None:
        """The default group.

        Raises:
            RuntimeError: it has other ranks than these nodes.
        """
        if dist.get_world_size() != self.world_size:
            raise RuntimeError(
                f"dgc.checkpoint: expected nodes that hold all {dist.get_world_size()} ranks of the default group, got "
                f"{self._rows} nodes with {self.world_size} ranks"
            )

    def sum_in_node(self, tensor: Tensor) -> None:
        """Sums a tensor in place over the ranks of this node; a collective of the node."""
        if dist.get_world_size(self.node) > 1:
            try:
                dist.all_reduce(tensor, group=self.node)
            except RuntimeError as error:
                raise failed("a sum inside the node", error) from error

    def everyone_in_node(self, text: str) -> list[str]:
        """Returns the texts of this node's ranks; a collective of the node."""
        return everyone_of(self.node, text)

    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, node after node; a collective of all nodes."""
        columns = [json.loads(column) for column in self.everyone_in_node(json.dumps(everyone_of(self.group, text)))]
        return [column[row] for row in range(self._rows) for column in columns]

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies the tensors of a node's ranks to the ranks that hold the same shard in other nodes; a collective.

        Args:
            tensors: contiguous.
            root: a rank of that node.
        """
        for tensor in tensors:
            dist.broadcast(tensor, group_src=root // dist.get_world_size(self.node), group=self.group)
