"""Data-parallel training of several workers in one process and one thread, step for step what DDP does with them.

Every worker has a replica of the network and an optimizer, and sees its own samples. For DGC it has a DGCState too: the
project's own core, over an exchange that hands payloads over in memory. Gradients, selection and update are the same as
in processes, which on few cores would take turns, and wait for each other at every step.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.optim.optimizer import Optimizer

import dgc
from dgc.exchange.base import Exchange
from dgc.memory.slots import Gradients
from dgc.ops.codec import Codec
from dgc.optim.base import DGCOptimizer

from .tasks import Task, loss_of, measure, schedule_of

WORKERS = 4

SomeOptimizer = TypeVar("SomeOptimizer", bound=Optimizer, covariant=True)


@dataclass(frozen=True)
class Replica(Generic[SomeOptimizer]):
    """One worker's network and its optimizer."""

    network: nn.Module
    optimizer: SomeOptimizer


Batch = tuple[Tensor, Tensor]
"""One worker's inputs and targets."""


class Trainer(Protocol):
    """What takes the steps of all workers."""

    @property
    def network(self) -> nn.Module:
        """The network that is measured."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """Those whose learning rate follows the task's schedule."""

    def learn(self, batches: Sequence[Batch]) -> None:
        """Takes one step, with a batch of each worker."""

    def check(self) -> None:
        """Raises RuntimeError if the workers have come apart."""


class Replicated(ABC):
    """A Trainer with a network and an optimizer for each worker."""

    replicas: Sequence[Replica[Optimizer]]
    """All workers', by rank."""

    @abstractmethod
    def reduce(self) -> None:
        """Replaces the gradients of all replicas by what their optimizers are to apply."""

    @property
    def network(self) -> nn.Module:
        """The first worker's; the others' are equal."""
        return self.replicas[0].network

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """All workers'."""
        return [replica.optimizer for replica in self.replicas]

    def learn(self, batches: Sequence[Batch]) -> None:
        """Computes each worker's gradients, reduces them and applies the result."""
        for replica, (inputs, targets) in zip(self.replicas, batches, strict=True):
            replica.optimizer.zero_grad()
            self.loss(replica.network, inputs, targets).backward()
        self.reduce()
        for replica in self.replicas:
            replica.optimizer.step()

    def loss(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of a worker's network on its batch."""
        return loss_of(network(inputs), targets)

    def check(self) -> None:
        """Compares the replicas.

        Raises:
            RuntimeError: they differ.
        """
        # As bits: NaN, which a run that diverges ends with, is not equal to itself.
        first, *others = ([p.detach().view(torch.int32) for p in r.network.parameters()] for r in self.replicas)
        if any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
            raise RuntimeError("replicas.py: expected replicas equal to the bit after training, got some that differ")


def train(
    task: Task, make: Callable[[nn.Module, Task], Trainer], seed: int, steps: int, points: int = 5
) -> list[tuple[int, float]]:
    """Trains from a seed of weights and samples, and returns the metric on the test samples.

    Returns:
        (step, metric) at `points` times that divide the run equally, the last one at its end.
    """
    torch.manual_seed(seed)
    return follow(task, make(task.network(), task), seed, steps, points)


def follow(task: Task, trainer: Trainer, seed: int, steps: int, points: int = 5) -> list[tuple[int, float]]:
    """Takes the steps of a run by the task's schedule, on samples of a seed, and returns the metric as train() does."""
    schedules = [schedule_of(task, optimizer, steps) for optimizer in trainer.optimizers]
    found = []
    for step, batches in enumerate(batches_of(task, seed, steps), start=1):
        trainer.learn(batches)
        for schedule in schedules:
            schedule.step()
        if step * points // steps > (step - 1) * points // steps:
            found.append((step, measure(task, trainer.network)))
    trainer.check()
    return found


def batches_of(task: Task, seed: int, steps: int, workers: int = WORKERS) -> Iterator[list[Batch]]:
    """Yields each worker's samples, for each step: passes over all samples in an order of their own."""
    data = task.load()
    generator = torch.Generator().manual_seed(seed)
    each, order = workers * task.batch_size, torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < each:
            order = torch.randperm(len(data.inputs), generator=generator)
        chosen, order = order[:each], order[each:]
        yield [(data.inputs[part], data.targets[part]) for part in chosen.split(task.batch_size)]


class Dense(Replicated):
    """Averaged gradients and torch.optim.SGD: plain DDP. Where the task clips, it clips the average."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        """Makes the replicas."""
        self.task = task
        self.replicas = [
            Replica(
                replica,
                torch.optim.SGD(
                    replica.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay
                ),
            )
            for replica in copies_of(network)
        ]

    def reduce(self) -> None:
        """Averages, and clips."""
        for together in zip(*(gradients(r.network) for r in self.replicas), strict=True):
            average = torch.stack(together).mean(0)
            for gradient in together:
                gradient.copy_(average)
        if self.task.clip_norm is not None:
            for replica in self.replicas:
                nn.utils.clip_grad_norm_(replica.network.parameters(), self.task.clip_norm)


class DGC(Replicated):
    """The project's core: one DGCState for each worker."""

    def __init__(
        self, network: nn.Module, task: Task, config: dgc.DGCConfig, codecs: Sequence[Codec | None] = (None,) * WORKERS
    ) -> None:
        """Makes the replicas and their states, with a codec for each where that is not to be DGCState's own."""
        replicas = dgc_replicas(network, task)
        meeting = Meeting()
        self.states = [
            dgc.DGCState(
                r.network.named_parameters(), r.optimizer, config, exchange=InProcess(rank, meeting), codec=codecs[rank]
            )
            for rank, r in enumerate(replicas)
        ]
        self.replicas = replicas

    def reduce(self) -> None:
        """Has every state reduce its replica's gradients, as one bucket."""
        futures = []
        for replica, state in zip(self.replicas, self.states, strict=True):
            parameters = [*replica.network.parameters()]
            buffer = torch.empty(sum(p.numel() for p in parameters))
            starts = accumulate((p.numel() for p in parameters), initial=0)
            places = [(0, start) for start, _ in zip(starts, parameters, strict=False)]
            bucket = Gradients([state.slot(p) for p in parameters], [buffer], places)
            # In the order of memory, which channels_last has changed.
            inside = [bucket.of(i).as_strided(slot.shape, slot.strides) for i, slot in enumerate(bucket.slots)]
            torch._foreach_copy_(inside, gradients(replica.network))
            state.begin()
            futures.append((parameters, inside, state.reduce(bucket)))
            state.end()
        for parameters, averages, future in futures:
            future.wait()
            for parameter, average in zip(parameters, averages, strict=True):
                parameter.grad = average


def dgc_replicas(network: nn.Module, task: Task) -> list[Replica[DGCOptimizer]]:
    """Returns replicas with dgc.SGD or dgc.AdamW."""
    return [Replica(replica, dgc_optimizer(replica.parameters(), task)) for replica in copies_of(network)]


def dgc_optimizer(parameters: Iterable[nn.Parameter], task: Task) -> DGCOptimizer:
    """Returns dgc.SGD or dgc.AdamW, with the task's recipe."""
    if task.optimizer == "AdamW":
        adamw: DGCOptimizer = dgc.AdamW(
            parameters, lr=task.lr, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay
        )
        return adamw
    return dgc.SGD(parameters, lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)


def gradients(network: nn.Module) -> list[Tensor]:
    """Returns the gradients of all parameters."""
    return [p.grad for p in network.parameters() if p.grad is not None]


def copies_of(network: nn.Module) -> list[nn.Module]:
    """Returns a replica for each worker."""
    return [copy.deepcopy(network) for _ in range(WORKERS)]


class Meeting:
    """Where the workers of one process leave what they send, until the last of them has."""

    def __init__(self) -> None:
        """Starts empty."""
        self._come: dict[str, dict[int, _Transfer]] = {}
        self._lock = Lock()

    def join(self, name: str, rank: int, transfer: _Transfer) -> None:
        """Completes all transfers of a bucket if this is the last one. Workers may come in threads, in any order."""
        with self._lock:
            come = self._come.setdefault(name, {})
            come[rank] = transfer
            if len(come) < WORKERS:
                return
            del self._come[name]
        transfers = [come[rank] for rank in range(WORKERS)]
        if transfers[0].payload is not None:
            everything = torch.stack([t.payload for t in transfers if t.payload is not None])
            for t in transfers:
                if t.gathered is not None:
                    t.gathered.copy_(everything)
        if transfers[0].dense is not None:
            average = torch.stack([t.dense for t in transfers if t.dense is not None]).mean(0)
            for t in transfers:
                if t.dense is not None:
                    t.dense.copy_(average)
        for t in transfers:
            t.done.set_result(None)


class _Transfer:
    """One worker's part of an exchange; see dgc.exchange.Transfer."""

    def __init__(self, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None) -> None:
        self.payload, self.gathered, self.dense = payload, gathered, dense
        self.done: Future[None] = Future()

    def arrived(self) -> AbstractContextManager[None]:
        return nullcontext()


class InProcess(Exchange):
    """One worker's view of a Meeting."""

    world_size = WORKERS

    def __init__(self, rank: int, meeting: Meeting) -> None:
        """Takes the rank's place."""
        self.rank, self.meeting = rank, meeting

    def refresh(self) -> None:
        """Does nothing: the workers stay the same."""

    def start(self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None) -> _Transfer:
        """Hands over this worker's part."""
        transfer = _Transfer(payload, gathered, dense)
        self.meeting.join(name, self.rank, transfer)
        return transfer

    def everyone(self, text: str) -> list[str]:
        """Returns the text: all workers are made by the same line."""
        return [text] * WORKERS

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Refuses.

        Raises:
            NotImplementedError: always; only workers that come and go need it.
        """
        raise NotImplementedError("replicas.py: workers neither come nor go")
