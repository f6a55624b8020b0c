"""attach: one call that puts Deep Gradient Compression between a model and its optimizer.

    optimizer = dgc.attach(model, optimizer, dgc.DGCConfig(density=0.01))

The model may be behind DistributedDataParallel, sharded by fully_shard (FSDP2), or a plain module: then dgc exchanges
its gradients without DDP, and broadcasts parameters and buffers once. `optimizer.dgc` is the DGCState.
"""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from . import fsdp
from .config import DGCConfig
from .memory.refusals import unwrapped
from .optim.convert import convert
from .state import DGCState


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    config: DGCConfig | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | Literal["auto"] | None = None,
    grad_scaler: GradScaler | None = None,
) -> Optimizer:
    """Compresses the exchange of a model's gradients; a collective, before the first backward pass.

    torch.optim.SGD, AdamW and Adam become dgc's of that name in place: the same object, groups and state, so that
    schedulers go on with it. Other optimizers are taken as DGCState takes them. A second call with the same arguments
    changes nothing.

    Args:
        model: a DistributedDataParallel module, a module that fully_shard has sharded, or a plain one whose ranks
            exchange nothing yet. One that torch.compile has made is looked into.
        optimizer: of all its trainable parameters. A wrapper, such as Accelerate's, is looked into.
        config: the same on all ranks; None for DGCConfig().
        process_group: as DGCState's.
        mesh: as DGCState's: nodes as workers.
        grad_scaler: as DGCState's.

    Returns:
        The optimizer that was given.

    Raises:
        TypeError, ValueError, RuntimeError: as DGCState and DGCState.register.
    """
    inside = unwrapped(optimizer)
    model = getattr(model, "_orig_mod", model)
    attached = getattr(inside, "dgc", None)
    if isinstance(attached, DGCState) and attached.registered:
        known = {id(p) for p in attached.parameters.by_name.values()}
        if known == {id(p) for p in model.parameters() if p.requires_grad}:
            return optimizer
        raise ValueError(
            "attach: expected an optimizer without a DGCState, got one that is attached to another model. Make an "
            "optimizer for this one"
        )
    convert(inside)
    state = DGCState(
        model.named_parameters(), inside, config, process_group=process_group, mesh=mesh, grad_scaler=grad_scaler
    )
    if isinstance(model, DistributedDataParallel) or fsdp.is_sharded(model):
        state.register(model)
    else:
        state.open_door(model, broadcast=True)
    for one in {id(inside): inside, id(optimizer): optimizer}.values():
        one.dgc = state  # type: ignore[attr-defined]
    return optimizer
