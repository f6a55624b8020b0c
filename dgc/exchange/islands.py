"""The exchange between islands over torch.distributed: a process group across nodes, and one inside each."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .base import Islands
from .distributed import DistributedExchange, all_gather, everyone_of, failed

# Renamed in torch 2.13, where the old name warns.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

logger = logging.getLogger("dgc")


class IslandExchange(Islands, DistributedExchange):
    """The exchange of one shard between nodes.

    Attributes:
        group: the ranks that hold the same shard, one of each node.
        node: the ranks of this node.
    """

    go_on = "Call state.discard(drop_gradient=False) and zero_grad(); or restart all ranks from a checkpoint"

    def __init__(self, device: torch.device, across: dist.ProcessGroup, node: dist.ProcessGroup) -> None:
        """Takes both groups for good; a collective.

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
        self.look_for_swapped_dimensions()

    def _place(self) -> tuple[int, int]:
        self.row, self.rows = super()._place()
        self.place, self.places = dist.get_rank(self.node), dist.get_world_size(self.node)
        return self.row * self.places + self.place, self.rows * self.places

    def bind(self, group: dist.ProcessGroup) -> None:
        """Checks the group of the DDP module whose gradients come.

        Raises:
            ValueError: it has other ranks than these nodes.
        """
        theirs, own = set(dist.get_process_group_ranks(group)), {*self.ranks, *dist.get_process_group_ranks(self.node)}
        if len(theirs) != self.world_size or not own <= theirs:
            raise ValueError(
                f"mesh: expected nodes that hold DDP's {len(theirs)} ranks, got {self.rows} nodes with "
                f"{self.world_size} ranks"
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
                f"{self.rows} nodes with {self.world_size} ranks"
            )

    def mean_in_node(self, name: str, parts: Tensor, mean: Tensor) -> Callable[[], None]:
        """Starts the mean of all ranks' parts for this rank; see Islands. On a GPU only the current stream waits."""
        places = len(parts)
        if mean.dtype == torch.float16:
            parts /= places  # before the sum, which would overflow
        try:
            if mean.is_cuda:
                received = mean
                work = _reduce_scatter(mean, parts, group=self.node, async_op=True)
            else:
                # gloo's reduce_scatter takes over twice as long; and this adds in the order of the ranks.
                received = torch.empty_like(parts)
                work = dist.all_to_all_single(received, parts, group=self.node, async_op=True)
        except RuntimeError as error:
            raise failed("the mean of a node's gradients", error) from error

        def finish() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                raise failed("the mean of a node's gradients", error) from error
            if received is not mean:
                torch.sum(received, 0, out=mean)
            if mean.dtype != torch.float16:
                mean.div_(places)

        return finish

    def gather_in_node(self, name: str, own: Tensor) -> Callable[[], Tensor]:
        """Starts an all-gather inside the node; see Islands. On a GPU only the current stream waits."""
        gathered = own.new_empty(self.places, len(own))
        work = all_gather(gathered.view(-1), own, group=self.node, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return gathered

        return finish

    def sum_in_node(self, tensor: Tensor) -> None:
        """Sums a tensor in place over the ranks of this node; a collective of the node."""
        if self.places > 1:
            try:
                dist.all_reduce(tensor, group=self.node)
            except RuntimeError as error:
                raise failed("a sum inside the node", error) from error

    def everyone_in_node(self, text: str) -> list[str]:
        """Returns the texts of this node's ranks; a collective of the node."""
        return everyone_of(self.node, text)

    def everyone_across(self, text: str) -> list[str]:
        """Returns the texts of the ranks that hold the same shard, node after node; a collective of these."""
        return everyone_of(self.group, text)

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies the tensors of a node's ranks to the ranks that hold the same shard in other nodes; a collective.

        Args:
            tensors: contiguous.
            root: a rank of that node.
        """
        for tensor in tensors:
            dist.broadcast(tensor, group_src=root // self.places, group=self.group)

    def bring(self, tensor: Tensor, root: int) -> None:
        """Copies a rank's tensor to the first rank, through the rank of its place in the first node; a collective.

        Args:
            tensor: contiguous; on the first rank and the one in between it is written.
            root: the rank that has it.

        Raises:
            RuntimeError: a rank on the way has gone.
        """
        row, place = divmod(root, self.places)
        try:
            if self.place == place:
                _bring_in(self.group, tensor, row)
            if self.row == 0:
                _bring_in(self.node, tensor, place)
        except RuntimeError as error:
            raise failed("the way of a share to the first rank", error) from error

    def broadcast_to_all(self, tensors: Sequence[Tensor]) -> None:
        """Copies the first rank's tensors to all ranks of all nodes; a collective."""
        self.broadcast(tensors, root=0)
        for tensor in tensors:
            dist.broadcast(tensor, group_src=0, group=self.node)


def _bring_in(group: dist.ProcessGroup | None, tensor: Tensor, root: int) -> None:
    """Copies the tensor of a group's rank to its first one."""
    rank = dist.get_rank(group)
    if rank == root != 0:
        dist.send(tensor, group=group, group_dst=0)
    elif rank == 0 != root:
        dist.recv(tensor, group=group, group_src=root)


def nodes_of(mesh: DeviceMesh | Literal["auto"]) -> DeviceMesh | None:
    """Returns the mesh of nodes and their ranks; None where each rank is a worker of its own.

    Args:
        mesh: of two dimensions, nodes and ranks of a node; or "auto": nodes of LOCAL_WORLD_SIZE ranks, as torchrun and
            launch/slurm.sbatch set it. "auto" is a collective of the default group.

    Raises:
        ValueError: the mesh has other dimensions; or the ranks do not form nodes of one size.
        RuntimeError: "auto" before init_process_group().
    """
    if isinstance(mesh, str):
        if mesh != "auto":
            raise ValueError(f'mesh: expected a DeviceMesh of two dimensions, "auto" or None, got {mesh!r}')
        if not dist.is_initialized():
            raise RuntimeError('mesh: expected "auto" after init_process_group(), got it before')
        return _from_environment()
    if mesh.ndim != 2:
        raise ValueError(
            f"mesh: expected two dimensions, nodes and ranks of a node, got {mesh.ndim}: init_device_mesh(device, "
            '(nodes, ranks_of_a_node), mesh_dim_names=("replicate", "shard"))'
        )
    return mesh


def _from_environment() -> DeviceMesh | None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = f"{os.environ.get('LOCAL_WORLD_SIZE', '1')}/{os.environ.get('LOCAL_RANK', '0')}"
    everyone = everyone_of(None, mine)
    sizes = {text.split("/")[0] for text in everyone}
    places = int(sizes.pop())
    if sizes or ranks % places or [text.split("/")[1] for text in everyone] != [str(r % places) for r in range(ranks)]:
        raise ValueError(
            f"mesh: expected nodes of one size, whose ranks follow each other, got LOCAL_WORLD_SIZE/LOCAL_RANK of "
            f"{', '.join(everyone[:16])}. Leave mesh out, or start as many processes on each machine"
        )
    if places == 1 or places == ranks:
        if rank == 0:
            what = "one rank a node" if places == 1 else "one node"
            logger.info('dgc: mesh="auto" finds %s: each rank is a worker of its own', what)
        return None
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return init_device_mesh(kind, (ranks // places, places), mesh_dim_names=("replicate", "shard"))
