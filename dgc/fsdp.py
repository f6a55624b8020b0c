"""The door for FSDP2: models sharded inside the node by fully_shard, whose gradients DGC exchanges between nodes.

    mesh = init_device_mesh("cuda", (nodes, ranks_of_a_node), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = dgc.AdamW(model.parameters(), lr=1e-3)
    state = dgc.DGCState(model.named_parameters(), optimizer, config, process_group=mesh["replicate"].get_group())
    state.register(model)

FSDP2 also has a hook of its own, set_all_reduce_hook. It sees gradients before FSDP2 divides and casts them, in a
buffer that lives no longer than the hook, and without those of earlier micro-batches. The hooks of parameters see what
the optimizer will see.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

from . import local


def is_sharded(model: object) -> bool:
    """Returns whether fully_shard has been applied to a module."""
    loaded = sys.modules.get("torch.distributed.fsdp")  # its import takes long, and no model can be sharded without it
    return loaded is not None and isinstance(model, loaded.FSDPModule)


def check_plain(model: nn.Module) -> None:
    """Checks that no part of a module belongs to FSDP1, whose gradients are averaged already, and are flat shards.

    Raises:
        TypeError: one does.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is not None and any(isinstance(module, loaded.FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "attach: expected a module without FullyShardedDataParallel (FSDP1), which averages gradients densely "
            "itself, got one with it. Shard it by fully_shard (FSDP2) inside the node, and pass mesh="
        )


def check_module(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Checks that DGC can exchange all gradients of a module that fully_shard has sharded.

    On the CPU it also tells FSDP2 to divide gradients itself: gloo returns sums where it is asked for averages
    (pytorch#162338).

    Raises:
        ValueError: it has other parameters than these, or some that are not sharded over the same ranks.
    """
    known = {id(p) for p in parameters.values()}
    if unknown := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]:
        raise ValueError(
            f"register: expected a DGCState made of all parameters of the model, but not of {', '.join(unknown[:5])}. "
            "Make it after fully_shard, of model.named_parameters(); where the model has been used since, call "
            "model.reshard() before"
        )
    inside = {id(p) for p in model.parameters()}
    if outside := [name for name, p in parameters.items() if id(p) not in inside]:
        raise ValueError(
            f"register: expected a model with all parameters of the DGCState, got one without {', '.join(outside[:5])}"
        )
    if plain := [name for name, p in parameters.items() if local.mesh_of(p) is None]:
        raise ValueError(
            f"register: expected parameters that fully_shard has sharded, got {', '.join(plain[:5])}, whose gradients "
            "it does not average inside the node: call fully_shard(model, mesh=...) on the whole model too, without "
            "ignored_params that are trained. Where the model has run since, call model.reshard() before DGCState is "
            "made"
        )
    meshes = [mesh for p in parameters.values() if (mesh := local.mesh_of(p)) is not None]
    groups = {tuple(dist.get_process_group_ranks(mesh.get_group())) for mesh in meshes}
    if len(groups) > 1:
        raise ValueError(f"register: expected all parameters sharded over the same ranks, got {sorted(groups)}")

    if any(p.device.type == "cpu" for p in parameters.values()):
        for module in model.modules():
            if is_sharded(module):
                cast("FSDPModule", module).set_force_sum_reduction_for_comms(True)
