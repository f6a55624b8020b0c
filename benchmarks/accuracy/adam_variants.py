"""AdamW under Deep Gradient Compression, in several ways, in plain PyTorch: dense, and the candidates for a rule.

For screening only. All workers share one network, since replicas would be equal to the bit; each has moments and a
residual of its own. What the candidates have in common is in AdamVariant.learn; in what they differ, in its rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import dgc
from dgc.step.schedule import DensitySchedule, entries

from .replicas import WORKERS, Batch
from .tasks import Task, loss_of
from .traffic import is_compressed, is_sparse

WARMUP = (0.0625, 0.0156, 0.004)
"""Densities of the warm-up. The default begins with 25 %, which is most of a run's bytes."""
DENSE_BELOW = 8192
"""In so small networks the default, 16,384 elements, would send 6 % of them dense."""
FLOOR = 0.3
"""Of the denominator with correction "cross", in parts of the momentum: an estimate of a square may be negative."""


@dataclass(frozen=True)
class Candidate:
    """A rule and its switches. The defaults are those of the local direction, noise-corrected."""

    rule: Literal["local direction", "local gradient", "naive", "SCAPE", "AdamS"] = "local direction"
    """The local gradient has the gradient itself in place of its momentum: dgc.AdamW's rule."""
    correction: Literal["corrected", "none", "cross"] = "corrected"
    """How a worker estimates the second moment of the mean of all gradients; see `second_moment`."""
    lr_at: Literal["departure", "arrival"] = "departure"
    """Whether the residual holds directions times the learning rate of their step."""
    masking: bool = False
    """Whether momentum becomes 0 where an entry is sent. SCAPE has no momentum there in any case."""
    shared_mask: bool = False
    """Whether all workers send the entries that are largest in their mean. That is generous to SCAPE, whose workers
    have to agree on a mask by what they send; it is counted as if they knew."""
    decay: float = 1.0
    """Factor of the residual at each step."""
    ahead: float = 0.0
    """Share of a worker's residual that its forward and backward pass find applied already; local rules only."""
    density: float = 0.01
    warmup: float = 0.3
    """Share of the run over which density falls."""
    dense_below: int = DENSE_BELOW

    @property
    def is_local(self) -> bool:
        """Whether each worker has moments of its own, and what it accumulates is a direction."""
        return self.rule.startswith("local")

    def config(self, steps: int) -> dgc.DGCConfig:
        """Returns the part that DGCConfig can express."""
        return dgc.DGCConfig(self.density, round(self.warmup * steps), WARMUP, dense_below=self.dense_below)


def noise_share(beta: float, workers: int) -> float:
    """Returns a, for which a g^2 + (1-a) mh^2 has the mean of the squared average of `workers` gradients.

    With signal S and noise V, E g^2 = S + V, E mh^2 = S + cV with c = (1-beta)/(1+beta), and S + V/N is wanted.
    """
    return max(0.0, 1 - (1 - 1 / workers) / (1 - (1 - beta) / (1 + beta)))


def second_moment(correction: str, g: Tensor, mh: Tensor, before: Tensor, beta: float, workers: int) -> Tensor:
    """Returns what enters the second moment.

    Args:
        correction: "none" takes a worker's own gradient for the average, "corrected" mixes it with its momentum, and
            "cross" takes products of gradients of different steps, whose noise is independent.
        g: a gradient.
        mh: the momentum with it, corrected for its start at 0.
        before: the same without it.
        beta: the decay of momentum.
        workers: the number of gradients that are averaged.
    """
    if correction == "cross":
        return g * g / workers + (1 - 1 / workers) * g * before
    a = 1.0 if correction == "none" else noise_share(beta, workers)
    return a * g * g + (1 - a) * mh * mh


def adams(m: Tensor, before: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Returns AdamS's direction, whose second moment is that of the momentum before and of the gradient in m."""
    g = (m - betas[0] * before) / (1 - betas[0])
    return m / ((betas[1] * before * before + (1 - betas[1]) * g * g).sqrt() + eps)


class Single:
    """A Trainer with one network for all workers."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        """Makes torch.optim.AdamW of all parameters; it passes over those without a gradient."""
        self.network, self.task = network, task
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=task.lr, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay
        )

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The one."""
        return [self.optimizer]

    def check(self) -> None:
        """Has nothing to compare."""

    def backward(self, inputs: Tensor, targets: Tensor, workers: int) -> None:
        """Computes the gradient of the mean loss, and clips it as one of `workers` that are averaged."""
        self.optimizer.zero_grad()
        loss_of(self.network(inputs), targets).backward()
        if self.task.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), math.sqrt(workers) * self.task.clip_norm)


class DenseAdamW(Single):
    """Averaged gradients, clipped, and torch.optim.AdamW: plain DDP."""

    def learn(self, batches: Sequence[Batch]) -> None:
        """Takes a step on all samples at once: their mean is the mean of the workers', which have equally many."""
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.backward(inputs, targets, 1)
        self.optimizer.step()


class AdamVariant(Single):
    """AdamW for what is dense, and a candidate's rule for what is compressed.

    Attributes:
        flat: the compressed parameters [elements], of which the network's are views.
        m: first moments [workers, elements]; [1, elements] where receivers have them.
        s: second moments, of the same shape.
        v: residuals [workers, elements].
        received: what arrived last [elements], for AdamS.
    """

    def __init__(self, network: nn.Module, task: Task, candidate: Candidate, steps: int) -> None:
        """Makes the workers' tensors."""
        super().__init__(network, task)
        if candidate.ahead and not candidate.is_local:
            raise ValueError(f"ahead: expected 0 with rule {candidate.rule!r}, got {candidate.ahead}")
        rows = WORKERS if candidate.is_local or candidate.rule == "AdamS" else 1
        if candidate.masking and rows == 1:
            raise ValueError(f"masking: expected False with rule {candidate.rule!r}, whose momentum is the receiver's")
        self.candidate, self.config, self.step = candidate, candidate.config(steps), 0
        self.schedule = DensitySchedule(self.config)
        everything = [*network.parameters()]
        compressed = [p for p in everything if is_compressed(p, candidate.dense_below)]
        self.dense = [p for p in everything if not is_compressed(p, candidate.dense_below)]
        self.parameters = [*compressed, *self.dense]
        self.sizes = [p.numel() for p in compressed]
        self.flat = torch.cat([p.detach().flatten() for p in compressed])
        for p, part in zip(compressed, self.flat.split(self.sizes), strict=True):
            p.data = part.view_as(p)
        self.m, self.s = (self.flat.new_zeros(rows, len(self.flat)) for _ in range(2))
        self.v = self.flat.new_zeros(WORKERS, len(self.flat))
        self.received = torch.zeros_like(self.flat)

    @property
    def lr(self) -> float:
        """The learning rate of this step."""
        lr: float = self.optimizer.param_groups[0]["lr"]
        return lr

    def learn(self, batches: Sequence[Batch]) -> None:
        """Computes the workers' gradients one after another, and takes the step."""
        gradients = self._gradients(batches)
        own, shared = gradients.split([len(self.flat), gradients.shape[1] - len(self.flat)], 1)
        self.optimizer.zero_grad()
        for p, part in zip(self.dense, shared.mean(0).split([p.numel() for p in self.dense]), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()
        density = self.schedule.density(self.step)
        self.step += 1
        self.flat.mul_(1 - self.lr * self.task.weight_decay)
        if not is_sparse(density, self.config, WORKERS):
            self.flat.sub_(self._adamw(own.mean(0)))
            return
        self.v.mul_(self.candidate.decay)
        rule = {"naive": self._naive, "SCAPE": self._scape, "AdamS": self._adams}.get(self.candidate.rule, self._local)
        self.flat.sub_(rule(own, density))

    def _gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the workers' gradients [workers, all elements], each at the point that the worker looks from."""
        rows, ahead = [], self.candidate.ahead * (1 if self.candidate.lr_at == "departure" else self.lr)
        here = self.flat.clone()
        for (inputs, targets), v in zip(batches, self.v, strict=True):
            if ahead:
                torch.sub(here, v, alpha=ahead, out=self.flat)
            self.backward(inputs, targets, WORKERS)
            rows.append(torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]))
        self.flat.copy_(here)
        return torch.stack(rows)

    def _adamw(self, g: Tensor) -> Tensor:
        """Returns AdamW's update for an average gradient; moments of the workers are averaged first."""
        first, second = self.task.betas
        m, s = self.m.mean(0).lerp_(g, 1 - first), self.s.mean(0).clamp_(min=0).lerp_(g * g, 1 - second)
        self.m.copy_(m)
        self.s.copy_(s)
        root = (s / (1 - second**self.step)).sqrt_()
        return self.lr * m / (1 - first**self.step) / (root + self.task.eps)

    def _local(self, g: Tensor, density: float) -> Tensor:
        """Returns the mean of what is sent of directions that each worker finds by its own moments."""
        candidate, (first, second) = self.candidate, self.task.betas
        before = self.m / (1 - first ** (self.step - 1)) if self.step > 1 else torch.zeros_like(self.m)
        mh = self.m.lerp_(g, 1 - first) / (1 - first**self.step)
        self.s.mul_(second).add_(second_moment(candidate.correction, g, mh, before, first, WORKERS), alpha=1 - second)
        root = (self.s.clamp(min=0) / (1 - second**self.step)).sqrt_()
        if candidate.correction == "cross":
            root = torch.maximum(root, FLOOR * mh.abs())
        departure = candidate.lr_at == "departure"
        self.v.add_(
            (mh if candidate.rule == "local direction" else g) / (root + self.task.eps),
            alpha=self.lr if departure else 1,
        )
        return self._send(density) * (1 if departure else self.lr)

    def _naive(self, g: Tensor, density: float) -> Tensor:
        """Returns AdamW's update for the mean of what is sent of gradients."""
        self.v.add_(g)
        return self._adamw(self._send(density))

    def _scape(self, g: Tensor, density: float) -> Tensor:
        """Returns AdamS's update for the mean of what is sent of momentum, which becomes 0 where nothing is sent."""
        first = self.task.betas[0]
        self.v.add_(first * self.m + (1 - first) * g)
        before = self.m[0].clone()
        self.m.copy_(self._send(density))
        return self.lr * adams(self.m[0], before, self.task.betas, self.task.eps)

    def _adams(self, g: Tensor, density: float) -> Tensor:
        """Returns AdamS's update for the mean of what is sent of DGC's v, sums of momentum as u accumulates it."""
        self.v.add_(self.m.lerp_(g, 1 - self.task.betas[0]))
        before, self.received = self.received, self._send(density)
        return self.lr * adams(self.received, before, self.task.betas, self.task.eps)

    def _send(self, density: float) -> Tensor:
        """Returns the mean of the entries that the workers send of v, where they become 0."""
        sent = torch.zeros_like(self.v)
        tensors = (every.split(self.sizes, 1) for every in (self.v, sent, self.m))
        for v, out, m in zip(*tensors, strict=True):
            compared = v.mean(0, keepdim=True).expand_as(v) if self.candidate.shared_mask else v
            chosen = compared.abs().topk(entries(density, v.shape[1]), sorted=False).indices
            out.scatter_(1, chosen, v.gather(1, chosen))
            v.scatter_(1, chosen, 0)
            if self.candidate.masking:
                m.scatter_(1, chosen, 0)
        return sent.mean(0)
