"""One training step of each competitor, defined once for all benchmarks of DDP.

- `no_sync`: no exchange at all and torch.optim.SGD(momentum=0.9), the limit.
- `ddp`: plain DDP, float32, with the same optimizer.
- `ddp fp16`: with PyTorch's fp16_compress_hook. `wrapped` also has
- `ddp bf16`: with PyTorch's bf16_compress_hook, which DDP takes under gloo by another name only.
- `powersgd`: with PyTorch's powerSGD_hook at rank 4, error feedback and warm start. One bucket: with more it deadlocks
  under gloo. It compresses from its third step on.
- `topk`: Deep Gradient Compression as one would write it in plain PyTorch, 0.1 % by torch.topk; see `TopK`.
- `dgc`: this package at 0.1 %.
- `dgc auto`: the same with DGCConfig(exchange="auto"), which settle() lets choose.
- `dgc door`: the same on a module without DDP, by dgc.attach.
- `no_sync adamw`: no exchange and torch.optim.AdamW(fused=True), the limit of
- `dgc adamw`: this package at 0.1 % with dgc.AdamW.

No `from __future__ import annotations` here: DDP compares a hook's annotations with the types themselves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import dgc

NAMES = ("no_sync", "ddp", "ddp fp16", "powersgd", "topk", "dgc")
DOOR = "dgc door"
AUTO = "dgc auto"
WITH_ADAMW = ("no_sync adamw", "dgc adamw")
DENSITY, LR, MOMENTUM, ADAM_LR = 0.001, 0.01, 0.9, 1e-3
POWERSGD_RANK, POWERSGD_START = 4, 2
"""Rank of its matrices, and the step from which on it compresses, the earliest that warm start allows."""
WARM_UP = 4  # steps until DDP has built its buckets again (1) and PowerSGD has compressed twice (4)


class TopK:
    """DGC in plain PyTorch: momentum correction and masking, torch.topk of each parameter, one all-gather a bucket.

    Written with care: values and 32-bit indices travel in one collective, while the backward pass goes on.
    """

    def __init__(self) -> None:
        """Starts with nothing accumulated."""
        self._memory: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Replaces the bucket by the average of what all ranks select of it."""
        buffer, world_size = bucket.buffer(), dist.get_world_size()
        values, indices, start = [], [], 0
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if parameter not in self._memory:
                self._memory[parameter] = (torch.zeros(gradient.numel()), torch.zeros(gradient.numel()))
            u, v = self._memory[parameter]
            u.mul_(MOMENTUM).add_(gradient.flatten())
            v.add_(u)
            selected = v.abs().topk(math.ceil(DENSITY * v.numel()), sorted=False).indices
            values.append(v[selected])
            indices.append(selected + start)
            u[selected] = v[selected] = 0
            start += v.numel()
        mine = torch.cat([torch.cat(values).view(torch.int32), torch.cat(indices).int()])
        everyone = [torch.empty_like(mine) for _ in range(world_size)]

        def scatter(_: torch.futures.Future[Any]) -> Tensor:
            count = mine.numel() // 2
            buffer.zero_()
            for payload in everyone:
                buffer.index_add_(0, payload[count:], payload[:count].view(torch.float32))
            return buffer.div_(world_size)

        gathered = dist.all_gather(everyone, mine, async_op=True)
        return gathered.get_future().then(scatter)  # type: ignore[no-any-return]


def topk_hook(state: TopK, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduces one DDP bucket."""
    return state.hook(bucket)


def bf16_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduces one DDP bucket in bfloat16."""
    return bf16_compress_hook(group, bucket)


def wrapped(name: str, module: nn.Module, **options: bool) -> DistributedDataParallel:
    """Returns a module under DDP, with PyTorch's hook of that name where it is one.

    Args:
        name: "ddp fp16", "ddp bf16" or "powersgd"; another one gets no hook.
        module: equal on all ranks.
        options: DDP's.
    """
    cap = {"bucket_cap_mb": 1 << 20} if name == "powersgd" else {}
    model = DistributedDataParallel(module, **cap, **options)  # type: ignore[arg-type]
    if name == "ddp fp16":
        model.register_comm_hook(None, fp16_compress_hook)
    elif name == "ddp bf16":
        model.register_comm_hook(dist.group.WORLD, bf16_hook)
    elif name == "powersgd":
        state = PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START)
        model.register_comm_hook(state, powerSGD_hook)
    return model


@dataclass(frozen=True)
class Competitor:
    """A model, wrapped and with an optimizer, that can take a step."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module], Tensor]
    state: dgc.DGCState | None = None

    def step(self) -> None:
        """Takes one training step."""
        self.optimizer.zero_grad()
        if self.name.startswith("no_sync"):
            assert isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync():
                self.loss(self.model).backward()
        else:
            self.loss(self.model).backward()
        self.optimizer.step()

    def settle(self) -> None:
        """Has "dgc auto" choose anew, by steps that follow each other as in a training; others do nothing."""
        if self.name != AUTO:
            return
        assert self.state is not None
        saved = self.state.state_dict()
        for share in saved["ranks"].values():
            share["choices"] = []
        self.state.load_state_dict(saved)
        self.step()
        while self.state.stats.choice is None:
            self.step()


def competitor(
    name: str, module: nn.Module, loss: Callable[[nn.Module], Tensor], density: float = DENSITY, **options: bool
) -> Competitor:
    """Returns a competitor that trains this module.

    Args:
        name: one of NAMES, DOOR, AUTO or WITH_ADAMW.
        module: its own; equal on all ranks.
        loss: runs the model that it is given on this rank's data.
        density: of dgc.
        options: DDP's, the same for all competitors.
    """
    if name not in (known := (*NAMES, DOOR, AUTO, *WITH_ADAMW)):
        raise ValueError(f"competitor: expected one of {', '.join(known)}, got {name!r}")
    if name == DOOR:
        converted = torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
        dgc.attach(module, converted, dgc.DGCConfig(density=DENSITY))
        return Competitor(name, module, converted, loss, converted.dgc)  # type: ignore[attr-defined]  # attach's
    model = wrapped(name, module, **options)
    optimizer: torch.optim.Optimizer
    state: dgc.DGCState | None = None
    if name.startswith("dgc"):
        if name == "dgc adamw":
            optimizer = dgc.AdamW(model.parameters(), lr=ADAM_LR)
        else:
            optimizer = dgc.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        config = dgc.DGCConfig(density=density, exchange="auto" if name == AUTO else "bytes")
        state = dgc.DGCState(model.named_parameters(), optimizer, config)
        state.register(model)
    elif name == "no_sync adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=ADAM_LR, fused=True)
    elif name == "topk":
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)  # momentum is in what it sends
        model.register_comm_hook(TopK(), topk_hook)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    return Competitor(name, model, optimizer, loss, state)
