"""The adapter for Hugging Face Accelerate: attach() for what accelerator.prepare() has returned."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .attach import attach as _attach
from .config import DGCConfig
from .needs import needs
from .state import DGCState

needs("1.15", "accelerate")


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    config: DGCConfig | None = None,
    *,
    mesh: DeviceMesh | Literal["auto"] | None = None,
    in_step: bool = False,
) -> None:
    """Compresses the exchange of a model that Accelerate has prepared; a collective, before the first backward pass.

    save_state() and load_state() then keep the residual of all ranks in the shared folder `dgc`, of a second optimizer
    in `dgc_1`; load a dense run before. Clipping by the accelerator is then an error, unless its limit is infinite.

    Args:
        accelerator: the one that has prepared both.
        model: as prepare() returned it.
        optimizer: as prepare() returned it; its `dgc` is then the DGCState.
        config: the same on all ranks; None for DGCConfig().
        mesh: as DGCState's: nodes as workers.
        in_step: as dgc.attach's, for several backward passes before a step, as in a GAN.

    Raises:
        TypeError, ValueError: one of them is not what prepare() returned, or is no DDP module; or as dgc.attach.
    """
    ddp = isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if not (ddp or alone) or not any(one is optimizer for one in accelerator._optimizers):
        raise TypeError(
            "attach: expected what accelerator.prepare() returns, with the model in DistributedDataParallel, got "
            f"{type(model).__name__} and {type(optimizer).__name__} under {accelerator.distributed_type.name}. Without "
            "a GPU write Accelerator(cpu=True), or TrainingArguments(use_cpu=True)"
        )
    _attach(model, optimizer, config, mesh=mesh, in_step=in_step)
    if not getattr(accelerator, "_has_dgc", False):
        accelerator._has_dgc = True
        accelerator.register_save_state_pre_hook(functools.partial(_save, accelerator))
        accelerator.register_load_state_pre_hook(functools.partial(_load, accelerator))
        accelerator.clip_grad_norm_ = _guarded(accelerator, accelerator.clip_grad_norm_, "max_norm")
        accelerator.clip_grad_value_ = _guarded(accelerator, accelerator.clip_grad_value_, "clip_value")


def _states(accelerator: Accelerator) -> dict[str, DGCState]:
    """Returns those of the optimizers that the accelerator has at present, by the folder of their residual."""
    return {f"dgc_{i}" if i else "dgc": o.dgc for i, o in enumerate(accelerator._optimizers) if hasattr(o, "dgc")}


def _save(accelerator: Accelerator, models: Any, weights: Any, output_dir: str) -> None:
    for folder, state in _states(accelerator).items():
        checkpoint.save(state, Path(output_dir) / folder)


def _load(accelerator: Accelerator, models: Any, input_dir: str) -> None:
    try:
        for folder, state in _states(accelerator).items():
            checkpoint.load(state, Path(input_dir) / folder)
    except ValueError as error:
        raise ValueError(f"{error}. Load a dense run before dgc.accelerate.attach()") from error


def _guarded(accelerator: Accelerator, clip: Callable[..., Any], limit: str) -> Callable[..., Any]:
    @functools.wraps(clip)
    def guarded(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if hasattr(parameters, "grad") else list(parameters)
        ours = {id(p) for state in _states(accelerator).values() for p in state.parameters.by_name.values()}
        if not math.isinf(args[0] if args else kwargs[limit]) and any(id(p) in ours for p in parameters):
            raise RuntimeError(
                f"{clip.__name__}: expected no clipping of what DGC has exchanged, sums of many steps: what is cut is "
                "lost. Leave it out, and write DGCConfig(clip_norm=...), which clips each rank's gradient before"
            )
        return clip(parameters, *args, **kwargs)

    return guarded
