"""The hook that leaves DDP's gradients as they are, for a step() that exchanges them.

No `from __future__ import annotations` here: DDP compares the hook's annotations with the types themselves.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .ddp import dgc_hook


def leave_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Returns this rank's own gradients, which backward passes then add up until step() exchanges them."""
    if state.detached or state.follower is not None:
        return dgc_hook(state, bucket)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def register(state: object, model: DistributedDataParallel) -> None:
    """Registers the hook on a DDP module without one, once.

    Raises:
        ValueError: it has a hook.
    """
    if any(hook is leave_hook and its_state is state for hook, its_state in model._comm_hooks):
        return
    if model._comm_hooks:
        raise ValueError(
            "register: expected a DDP module without a hook for in_step=True, got one that has one, and DDP takes one "
            "hook only. Wrap the module in DistributedDataParallel again"
        )
    model.register_comm_hook(state, leave_hook)
