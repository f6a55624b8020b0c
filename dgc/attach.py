"""attach: one call that puts Deep Gradient Compression between a model and its optimizer.

    optimizer = dgc.attach(model, optimizer, dgc.DGCConfig(density=0.01))

The model may be behind DistributedDataParallel, sharded by fully_shard (FSDP2), or a plain module: then dgc exchanges
its gradients without DDP, and broadcasts parameters and buffers once. `optimizer.dgc` is the DGCState, and
`optimizer.dgc.detach()` undoes this.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from . import fsdp
from .config import DGCConfig
from .memory.refusals import unwrapped
from .optim.convert import converted
from .state import DGCState
from .step import log
from .step.advice import no_config

logger = logging.getLogger("dgc")


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    config: DGCConfig | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | Literal["auto"] | None = None,
    grad_scaler: GradScaler | None = None,
    average: bool = True,
    in_step: bool = False,
) -> Optimizer:
    """Compresses the exchange of a model's gradients; a collective, between step() and the next backward().

    torch.optim.SGD, AdamW and Adam become dgc's of that name in place: the same object, groups and state, so that
    schedulers go on with it, and so does a run that was dense until now. Other optimizers are taken as DGCState takes
    them. A second call with the same arguments changes nothing, and one with another config is an error.

    Args:
        model: a DistributedDataParallel module, a module that fully_shard has sharded, or a plain one whose ranks
            exchange nothing yet. One that torch.compile has made is looked into.
        optimizer: of all its trainable parameters. A wrapper, such as Accelerate's, is looked into.
        config: the same on all ranks; None for DGCConfig().
        process_group: as DGCState's.
        mesh: as DGCState's: nodes as workers.
        grad_scaler: as DGCState's; None for that of Accelerate's wrapper, if it has one.
        average: as DGCState's: False where the loss is divided by what all ranks have together, as in torchtitan.
        in_step: as DGCState.register's: exchanges in step(), for loops of several backward passes before a step.

    Returns:
        The optimizer that was given.

    Raises:
        TypeError, ValueError, RuntimeError: as DGCState and DGCState.register; the optimizer is then as it was.
    """
    inside = unwrapped(optimizer)
    model = getattr(model, "_orig_mod", model)
    attached = getattr(inside, "dgc", None)
    if isinstance(attached, DGCState) and attached.registered:
        known = {id(p) for p in attached.parameters.by_name.values()}
        if known == {id(p) for p in model.parameters() if p.requires_grad}:
            _check_again(attached, config)
            return optimizer
        raise ValueError(
            "attach: expected an optimizer without a DGCState, got one that is attached to another model. Make an "
            "optimizer for this one"
        )
    with converted(inside) as changed:
        state = DGCState(
            model.named_parameters(),
            inside,
            config,
            process_group=process_group,
            mesh=mesh,
            grad_scaler=grad_scaler or _scaler_of(optimizer),
            average=average,
        )
        if isinstance(model, DistributedDataParallel) or fsdp.is_sharded(model):
            state.register(model, in_step=in_step)
        else:
            log.log_alone()
            state.register_plain(model, in_step=in_step)
    if changed and state.exchange.rank == 0:
        name = type(inside).__name__
        logger.info("dgc: torch.optim.%s has become dgc.%s: the same object, groups and state", name, name)
    for one in {id(inside): inside, id(optimizer): optimizer}.values():
        one.dgc = state  # type: ignore[attr-defined]
    if hasattr(optimizer, "_optimizer_original_step_method"):
        optimizer.__setstate__({})  # Accelerate's wrapper has kept step() of torch's optimizer: it looks again
    return optimizer


def _check_again(attached: DGCState, config: DGCConfig | None) -> None:
    """Refuses a second call with another configuration, which would have no effect.

    Raises:
        ValueError: neither the configuration of the first call nor the one in force is given.
    """
    if config in (None, attached.made_with, attached.config):
        return
    if not isinstance(config, DGCConfig):
        raise TypeError(no_config(config))
    now = attached.made_with.as_dict()
    other = [
        f"{name} {value!r} in place of {now[name]!r}" for name, value in config.as_dict().items() if value != now[name]
    ]
    raise ValueError(
        f"attach: expected the configuration of the first call, got {', '.join(other)}. For another density call "
        "optimizer.dgc.set_density(density) on all ranks; for anything else detach first, optimizer.dgc.detach(), and "
        "attach again"
    )


def _scaler_of(optimizer: Any) -> GradScaler | None:
    """Returns the GradScaler that Accelerate's wrapper of an optimizer uses; None without one."""
    scaler = getattr(optimizer, "__dict__", {}).get("scaler")
    return scaler if isinstance(scaler, GradScaler) else None
