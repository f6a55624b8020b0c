"""What dgc.LocalSteps refuses, and what islands compare before each round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Integral

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from dgc.config import DGCConfig
from dgc.ddp import ranks_of
from dgc.door import has_door
from dgc.exchange.base import Exchange
from dgc.exchange.distributed import DistributedExchange
from dgc.local import local
from dgc.optim.base import DGCOptimizer
from dgc.state import DGCState


def check_arguments(model: nn.Module, inner: Optimizer, config: DGCConfig, every: int, delay: int) -> None:
    """Checks what needs no other island; raises as LocalSteps."""
    if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every: expected a number of steps >= 1, got {every!r}")
    if not isinstance(delay, Integral) or isinstance(delay, bool) or not 0 <= delay < every:
        raise ValueError(
            f"delay: expected a number of steps in [0, {every}), so that a round has arrived, got {delay!r}"
        )
    if isinstance(inner, DGCOptimizer):
        raise TypeError(
            f"inner_optimizer: expected one whose steps are an island's own, got dgc.{type(inner).__name__}, whose "
            f"gradients a DGCState reduces at every step. Write torch.optim.{type(inner).__name__}"
        )
    if not isinstance(config, DGCConfig):
        raise TypeError(f"config: expected a DGCConfig or None, got {type(config).__name__}")
    if config.clip_norm is not None:
        raise ValueError(
            f"clip_norm: expected None for LocalSteps, got {config.clip_norm}: it would clip the way of a whole round. "
            "Clip gradients in the loop, by torch.nn.utils.clip_grad_norm_ before the inner step()"
        )
    if config.exchange == "auto":
        raise ValueError(
            'exchange: expected "bytes" for LocalSteps, got "auto": rounds are few, and mostly local steps, so that '
            "timing them says little"
        )
    refuse_dgc(model)


def refuse_dgc(model: nn.Module) -> None:
    """Refuses a model whose gradients a DGCState reduces.

    Raises:
        ValueError: it does.
    """
    hooks = model._comm_hooks if isinstance(model, DistributedDataParallel) else []
    if any(isinstance(state, DGCState) for _, state in hooks) or any(map(has_door, model.parameters())):
        raise ValueError(
            "LocalSteps: expected a model without a DGCState, got one that is registered: it exchanges gradients "
            "between islands at every step, and LocalSteps would exchange the same way once more. Take one of them"
        )


def check_optimizer(inner: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Checks that the inner optimizer moves the model's own parameters.

    Raises:
        ValueError: it holds others, or not all.
    """
    held = {id(p): p for group in inner.param_groups for p in group["params"]}
    own = {id(p) for p in weights.values()}
    if missing := [name for name, p in weights.items() if id(p) not in held]:
        raise ValueError(
            f"inner_optimizer: expected it to hold every trainable parameter of the model, but not "
            f"{', '.join(missing[:5])}. One that works on copies of its own (flat or float32 ones) would not see what "
            "a round brings, and is not supported; else pass it model.parameters(), or freeze the rest"
        )
    if others := [tuple(p.shape) for key, p in held.items() if key not in own and p.requires_grad]:
        raise ValueError(
            f"inner_optimizer: expected the model's parameters alone, got others of shape "
            f"{', '.join(map(str, others[:5]))}, which islands would never exchange. Put them into the model"
        )


def check_islands(model: nn.Module, exchange: Exchange) -> None:
    """Checks that DDP does not average over ranks that are to be islands of their own.

    Raises:
        ValueError: it does.
    """
    if not (isinstance(model, DistributedDataParallel) and isinstance(exchange, DistributedExchange)):
        return
    if both := sorted(set(ranks_of(model)) & set(exchange.ranks) - {dist.get_rank()}):
        raise ValueError(
            f"LocalSteps: expected DDP inside an island and the outer exchange between islands, got ranks {both} in "
            "both: they would be equal at every step, with nothing to exchange. With mesh = init_device_mesh(device, "
            '(islands, ranks_of_an_island), mesh_dim_names=("islands", "inside")), write '
            'DistributedDataParallel(net, process_group=mesh["inside"].get_group()) and LocalSteps(..., mesh=mesh)'
        )


def check_same(model: nn.Module, inner: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Checks before a round that the model and its optimizer still have the parameters they began with.

    Raises:
        RuntimeError: some were replaced.
        ValueError: a DGCState was registered since.
    """
    refuse_dgc(model)
    there = {id(p) for p in model.parameters()}
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    if replaced := [name for name, p in weights.items() if id(p) not in there or id(p) not in held]:
        raise RuntimeError(
            f"LocalSteps: expected the parameters that it was made with, but {', '.join(replaced[:5])} were replaced, "
            "in the model or in the inner optimizer, so that the way from theta_0 is lost. Change values in place, or "
            "make LocalSteps anew, on all islands at once. After an evaluation under FSDP2, call model.reshard()"
        )


def compare(mine: Mapping[str, object], finishing: bool, exchange: Exchange) -> bool:
    """Compares a description of this round with all islands'; a collective.

    Args:
        mine: what has to be equal.
        finishing: whether this island takes no further steps.
        exchange: between islands.

    Returns:
        Whether all islands are finishing.

    Raises:
        ValueError: on every rank, naming what differs and where.
    """
    everyone = [json.loads(text) for text in exchange.everyone(json.dumps([{**mine}, finishing]))]
    places = exchange.topology.places
    wrong = [
        f"{key}: rank {rank % places} has {everyone[rank % places][0].get(key)}, rank {rank} has {theirs.get(key)}"
        for rank, (theirs, _) in enumerate(everyone)
        for key in {**everyone[rank % places][0], **theirs}
        if theirs.get(key) != everyone[rank % places][0].get(key)
    ]
    if wrong:
        raise ValueError(
            f"LocalSteps: expected all islands at the same round, but {'; '.join(wrong[:5])}. Nothing was exchanged. "
            "Load the same checkpoint on all of them"
        )
    return all(done for _, done in everyone)


def forget_broken(inner: Optimizer, weights: Mapping[str, Tensor]) -> list[str]:
    """Removes state of the inner optimizer that is not finite, and returns the parameters' names.

    Without that an island's moments would make each of its later rounds bad.
    """
    broken = []
    for name, p in weights.items():
        tensors = [t for t in inner.state.get(p, {}).values() if isinstance(t, Tensor) and t.is_floating_point()]
        if not all(bool(local(t).isfinite().all()) for t in tensors):
            del inner.state[p]
            broken.append(name)
    return broken
