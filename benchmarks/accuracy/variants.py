"""Deep Gradient Compression with each technique on a switch, in plain PyTorch: what dgc.DGCConfig cannot express.

For the ablation only. With the switches where the package has them it gives the package's results;
tests/benchmarks/test_convergence.py holds it to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dgc.optim.base import MASKED_BELOW

from .replicas import WORKERS, Batch, Replicated, dgc_replicas, gradients
from .tasks import Task

WARMUP = (0.25, 0.0625, 0.015625, 0.004)
"""Densities of equal phases (paper, section 3.3)."""


@dataclass(frozen=True)
class Technique:
    """What is done to a gradient before 0.1 % of it is sent. The defaults are those of the paper."""

    residual: bool = True
    """Whether what was not sent is kept."""
    correction: bool = True
    """Whether momentum is applied before selection, on each worker; else by the optimizer, to the averaged update."""
    masking: bool | Literal["auto"] = True
    clip_norm: float | None = None
    """Local clipping with correction, at sqrt(workers) * clip_norm."""
    warmup_steps: int = 0
    density: float = 0.001
    dense_below: int = 0
    at_least: int = 1
    """Entries of each tensor that are sent."""
    one_selection: bool = False
    """Whether the largest entries of all tensors together are sent, not of each."""
    unit: int = 1
    """The number of consecutive elements that are chosen as one, by the largest of them."""
    ahead: float = 0.0
    """A worker computes its gradient at the parameters minus this share of its own update that waits (step-ahead)."""

    def density_at(self, step: int) -> float:
        """Returns the density of a step."""
        phases = [d for d in WARMUP if d > self.density]
        return self.density if step >= self.warmup_steps else phases[step * len(phases) // self.warmup_steps]

    def masks(self, step: int) -> bool:
        """Returns whether the momentum of sent entries is cleared at a step."""
        return self.density_at(step) < MASKED_BELOW if self.masking == "auto" else self.masking


class Variant(Replicated):
    """Reduces all workers' gradients; to each worker's dgc.SGD it is what a DGCState would be."""

    unscales, pending, skip = False, True, None

    def __init__(self, network: nn.Module, task: Task, technique: Technique) -> None:
        """Makes the replicas, and momentum and residual of all workers: [workers, elements] for each selection."""
        self.momentum, self.technique, self.step = task.momentum, technique, 0
        replicas = dgc_replicas(network, task)
        for replica in replicas:
            replica.optimizer.attach(self)
        self.replicas = replicas
        parameters = [*network.parameters()]
        compressed = [i for i, p in enumerate(parameters) if p.ndim > 1 and p.numel() >= technique.dense_below]
        self.selections = [compressed] if technique.one_selection else [[i] for i in compressed]
        sizes = [sum(parameters[i].numel() for i in selection) for selection in self.selections]
        self.u, self.v = ([torch.zeros(WORKERS, size) for size in sizes] for _ in range(2))
        self.has_momentum = set(compressed) if technique.correction else set()
        self.optimizer_momentum = {
            id(p): torch.zeros_like(p)
            for replica in self.replicas
            for i, p in enumerate(replica.network.parameters())
            if i not in self.has_momentum
        }

    def collect(self) -> None:
        """Does nothing."""

    def take(self) -> bool:
        """Returns that no step is left out."""
        return True

    def kept_of(self, parameter: Tensor) -> dict[str, Tensor] | None:
        """Returns the momentum that the optimizer is to apply; None where the update has it already."""
        momentum = self.optimizer_momentum.get(id(parameter))
        return None if momentum is None else {"momentum": momentum}

    def learn(self, batches: Sequence[Batch]) -> None:
        """Takes one step, with gradients at the point that each worker looks from."""
        if self.technique.ahead:
            self.here = [p.detach().clone() for p in self.network.parameters()]
            for rank, replica in enumerate(self.replicas):
                self._look_ahead(rank, replica.optimizer.param_groups[0]["lr"])
        super().learn(batches)

    @torch.no_grad()
    def _look_ahead(self, rank: int, lr: float) -> None:
        parameters = [*self.replicas[rank].network.parameters()]
        for selection, v in zip(self.selections, self.v, strict=True):
            parts = v[rank].split([parameters[j].numel() for j in selection])
            for j, part in zip(selection, parts, strict=True):
                parameters[j].sub_(part.view_as(parameters[j]), alpha=lr * self.technique.ahead)

    def _look_from_here(self) -> None:
        for replica in self.replicas if self.technique.ahead else ():
            for p, here in zip(replica.network.parameters(), self.here, strict=True):
                p.data.copy_(here)

    def reduce(self) -> None:
        """Clips, accumulates, selects and averages."""
        self._look_from_here()
        by_worker = [gradients(replica.network) for replica in self.replicas]
        if self.technique.clip_norm is not None:
            threshold = math.sqrt(WORKERS) * self.technique.clip_norm
            for replica in self.replicas:
                nn.utils.clip_grad_norm_(replica.network.parameters(), threshold)
        stacked = [torch.stack(together) for together in zip(*by_worker, strict=True)]
        updates = [together.mean(0) for together in stacked]
        for i, selection in enumerate(self.selections):
            flat = self._send(i, torch.cat([stacked[j].flatten(1) for j in selection], 1))
            for j, part in zip(selection, flat.split([updates[j].numel() for j in selection]), strict=True):
                updates[j] = part.view_as(updates[j])
        for gradients_ in by_worker:
            torch._foreach_copy_(gradients_, updates)
        self.step += 1

    def _send(self, i: int, h: Tensor) -> Tensor:
        """Returns the average of what the workers send of one selection; h: [workers, elements]."""
        technique, u, v = self.technique, self.u[i], self.v[i]
        if technique.correction:
            h = u.mul_(self.momentum).add_(h)
        v.add_(h)
        k = max(technique.at_least, math.ceil(technique.density_at(self.step) * v.shape[1]))
        chosen = largest(v, min(k, v.shape[1]), technique.unit)
        sent = torch.zeros_like(v).scatter_(1, chosen, v.gather(1, chosen))
        if technique.residual:
            v.scatter_(1, chosen, 0)
        else:
            v.zero_()
        if technique.masks(self.step):
            u.scatter_(1, chosen, 0)
        return sent.mean(0)


def largest(v: Tensor, k: int, unit: int) -> Tensor:
    """Returns the indices of the k largest magnitudes of each row, or of the k / unit largest units, at least one.

    A unit that the end of a row cuts off is never chosen.
    """
    if unit == 1 or v.shape[1] < unit:
        return v.abs().topk(k, sorted=False).indices
    units = v[:, : v.shape[1] // unit * unit].unflatten(1, (-1, unit)).abs().amax(2)
    first: Tensor = units.topk(max(1, round(k / unit)), sorted=False).indices * unit
    return (first[:, :, None] + torch.arange(unit)).flatten(1)
