"""Trains one of time_to_accuracy.py's runs on real links, until the metric on the test samples is good enough.

Every rank is a process of one thread behind a cable of its own (links/namespaces.py). The clock runs from one
evaluation to the next, and is that of the slowest rank: data, zero_grad, forward, backward, clipping, optimizer and
schedule. Neither the start nor the evaluations are in the time or the bytes. The start is DDP's broadcast of the
weights, and a few steps of a model that is thrown away. Rank 0 evaluates, and tells the others, so that all of them
stop after the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

import dgc
from benchmarks.accuracy.replicas import Batch, batches_of, dgc_optimizer
from benchmarks.accuracy.runs import Point, Run, told
from benchmarks.accuracy.tasks import TASKS, Task, loss_of, measure, schedule_of

from .competitors import POWERSGD_RANK, POWERSGD_START, wrapped
from .links import namespaces
from .links.meter import counted, slowest, timed
from .links.ranks import finish, spawned

UNLIMITED = "unlimited"
"""The rate where there can be no limits."""
DENSITY, WARM_UP = 0.01, 0.1
"""Of dgc, and the part of the run over which density falls."""
DENSE_BELOW = 8192
"""In so small networks the default, 16,384 elements, would send 6 % of the GPT dense."""
REHEARSED = 5  # steps, with DDP's rebuilt buckets and PowerSGD's first matrices
METHODS = ("ddp", "ddp bf16", "powersgd", "dgc", "dgc, no warm-up", "dgc auto")
RIVALS = METHODS[:2]
"""The better one of them is what counts."""


@dataclass(frozen=True)
class Training(Run):
    """One training run over links; `steps` is its longest length, that of its learning rate's schedule."""

    rate: str
    ranks: int
    target: float
    """Of the task's metric, at which the run ends."""
    every: int
    """Steps from one evaluation to the next."""
    samples: int | None = None
    """Of the test samples, the first of which are evaluated; None for all."""


def reaches(task: Task, metric: float, target: float) -> bool:
    """Returns whether a metric is as good as the target; one that is not a number is not."""
    return metric >= target if task.metric == "accuracy" else metric <= target


def config(method: str, task: Task, steps: int) -> dgc.DGCConfig | None:
    """Returns a method's configuration; None for others than dgc."""
    if not method.startswith("dgc"):
        return None
    return dgc.DGCConfig(
        DENSITY,
        warmup_steps=round(WARM_UP * steps) if method == "dgc" else 0,
        clip_norm=task.clip_norm,
        dense_below=DENSE_BELOW,
        exchange="auto" if method == "dgc auto" else "bytes",
    )


def settings(method: str, task: Task, steps: int) -> str:
    """Returns what a run depends on besides the fields of Training."""
    chosen = config(method, task, steps)
    if chosen is not None:
        return f"{task.recipe}, {told(chosen)}"
    how = f" of rank {POWERSGD_RANK} from step {POWERSGD_START} on" if method == "powersgd" else ""
    return f"{task.recipe}, {method}{how}"


class Learner:
    """One rank's part of a data-parallel training."""

    def __init__(self, run: Training) -> None:
        """Makes the model, equal on all ranks, its optimizer and the schedule; a collective."""
        self.task, self.samples = TASKS[run.task], run.samples
        torch.manual_seed(run.seed)
        self.network = self.task.network()
        self.model = wrapped(run.method, self.network, gradient_as_bucket_view=True)
        chosen = config(run.method, self.task, run.steps)
        self.optimizer: Optimizer
        if chosen is None:
            self.optimizer = _optimizer(self.model, self.task)
        else:
            self.optimizer = dgc_optimizer(self.model.parameters(), self.task)
            state = dgc.DGCState(self.model.named_parameters(), self.optimizer, chosen)
            state.register(self.model)
        self.clip_norm = self.task.clip_norm if chosen is None else None  # dgc clips by itself
        self.schedule = schedule_of(self.task, self.optimizer, run.steps)

    def learn(self, batch: Batch) -> None:
        """Takes a step."""
        inputs, targets = batch
        self.optimizer.zero_grad()
        loss_of(self.model(inputs), targets).backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()

    def judged(self) -> float:
        """Returns the metric on the test samples, by rank 0's network; a collective."""
        first = dist.get_rank() == 0
        metric = torch.tensor(measure(self.task, self.network, self.samples) if first else 0.0, dtype=torch.float64)
        dist.broadcast(metric, 0)
        return metric.item()

    def check(self) -> None:
        """Compares all ranks' parameters with rank 0's; a collective.

        Raises:
            RuntimeError: they differ.
        """
        own = nn.utils.parameters_to_vector(self.network.parameters()).detach()
        first = own.clone()
        dist.broadcast(first, 0)
        if not torch.equal(own, first):
            raise RuntimeError(f"rank {dist.get_rank()}: expected the parameters of rank 0, got others after training")


def _optimizer(model: DistributedDataParallel, task: Task) -> Optimizer:
    # Fused, as dgc's own are.
    if task.optimizer == "AdamW":
        return torch.optim.AdamW(
            model.parameters(), lr=task.lr, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay, fused=True
    )


def curve(
    run: Training,
    learn: Callable[[Batch], None],
    judged: Callable[[], float],
    spent: Callable[[Callable[[], None]], tuple[float, float]],
    rank: int,
) -> list[Point]:
    """Trains until the target, or to the end, and returns (step, metric, seconds, bytes a rank has sent) on the way.

    Args:
        run: what it trains.
        learn: takes a step with a batch of this rank.
        judged: returns the metric, the same on all ranks.
        spent: does something, and returns its seconds and bytes, the same on all ranks.
        rank: this one.
    """
    batches = batches_of(TASKS[run.task], run.seed, run.steps, run.ranks)

    def block() -> None:
        for batch in islice(batches, run.every):
            learn(batch[rank])

    step, metric, seconds, sent = 0, judged(), 0.0, 0.0
    points: list[Point] = [(step, metric, seconds, sent)]
    while step < run.steps and not reaches(TASKS[run.task], metric, run.target):
        more, bytes_ = spent(block)
        step, metric = min(step + run.every, run.steps), judged()
        seconds, sent = seconds + more, sent + bytes_
        points.append((step, metric, seconds, sent))
    return points


def rehearse(run: Training, rank: int) -> None:
    """Takes a few steps with a model that is thrown away; a collective.

    In a first step torch imports modules and sets itself up, for 1 to 2 seconds.
    """
    learner = Learner(run)
    for batch in islice(batches_of(learner.task, run.seed, REHEARSED, run.ranks), REHEARSED):
        learner.learn(batch[rank])


def worker(rank: int, run: Training, folder: str) -> None:
    """Trains on one rank."""
    torch.set_num_threads(1)
    link = namespaces.Link(rank) if run.rate != UNLIMITED else None
    dist.init_process_group("gloo", rank=rank, world_size=run.ranks, store=dist.FileStore(f"{folder}/store", run.ranks))
    points = _trained(rank, run, link)
    finish(points, folder)


def _trained(rank: int, run: Training, link: namespaces.Link | None) -> list[list[float]]:
    rehearse(run, rank)
    learner = Learner(run)
    if link:
        link.limit(run.rate)

    def spent(action: Callable[[], None]) -> tuple[float, float]:
        seconds: list[float] = []
        if link:
            sent = counted(link, lambda: seconds.append(timed(action)), run.ranks)
        else:
            sent = math.nan
            seconds.append(timed(action))
        return slowest(seconds)[0], sent

    points = curve(run, learner.learn, learner.judged, spent, rank)
    learner.check()
    return [[*point] for point in points]


def perform(run: Run) -> Sequence[Point]:
    """Trains, in a process that does nothing else; its ranks end with it, and it with the one that started it."""
    assert isinstance(run, Training)
    namespaces.die_with_parent()
    points: Sequence[Point] = spawned(worker, run.ranks, run.rate != UNLIMITED, run)
    return points
