"""One training step of each competitor where several ranks make a node, and nodes share a slow link.

- `no_sync`: no exchange at all and torch.optim.SGD(momentum=0.9), the limit.
- `ddp`: plain DDP, float32, with the same optimizer.
- `ddp bf16`: with PyTorch's bf16_compress_hook.
- `dgc`: this package at 0.1 % under DDP, every rank a worker of its own.
- `dgc nodes`: the same with mesh=, every node a worker.
- `hsdp`: fully_shard over nodes and ranks, with FSDP2's own all-reduce between nodes and torch.optim.SGD.
- `dgc fsdp2`: fully_shard over the ranks of a node, and this package at 0.1 % between nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import dgc

from .competitors import DENSITY, LR, MOMENTUM, Competitor, wrapped

NODE_NAMES = ("no_sync", "ddp", "ddp bf16", "dgc", "dgc nodes", "hsdp", "dgc fsdp2")
COMPRESSED = ("dgc", "dgc nodes", "dgc fsdp2")


def competitor_in_nodes(
    name: str, module: nn.Module, loss: Callable[[nn.Module], Tensor], mesh: DeviceMesh
) -> Competitor:
    """Returns a competitor that trains this module.

    Args:
        name: one of NODE_NAMES.
        module: its own; equal on all ranks.
        loss: runs the model that it is given on this rank's data.
        mesh: of nodes and their ranks, with the names "replicate" and "shard".
    """
    if name not in NODE_NAMES:
        raise ValueError(f"competitor: expected one of {', '.join(NODE_NAMES)}, got {name!r}")
    model: nn.Module
    if name in ("hsdp", "dgc fsdp2"):
        model = _sharded(module, mesh if name == "hsdp" else mesh["shard"])
    else:
        model = wrapped(name, module, gradient_as_bucket_view=True)
    if name not in COMPRESSED:
        return Competitor(name, model, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM), loss)
    optimizer = dgc.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    nodes = None if name == "dgc" else mesh
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=DENSITY), mesh=nodes)
    state.register(model)
    return Competitor(name, model, optimizer, loss, state)


def _sharded(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Returns the module with each block, or each layer where there are no blocks, sharded by itself."""
    blocks = getattr(module, "blocks", module)
    for part in blocks.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)  # gloo has no averages (pytorch#162338)
    return module
