"""Rehearsal: training steps in which all is real but the network, so that what is left of a step is the exchange.

Each rank trains for itself, in a process group of its own, and all ranks do so at the same time, as they will. DGC
compresses, and unpacks as many payloads as there are workers: copies of this rank's own.

No `from __future__ import annotations` here: DDP compares a hook's annotations with the types themselves.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgc.config import DGCConfig
from dgc.exchange.base import Topology
from dgc.exchange.distributed import DistributedExchange, DistributedTransfer
from dgc.optim import SGD, AdamW
from dgc.state import DGCState

from .forecast import FLOAT32
from .links import half_of_backend, slowest, timed, wait_for_device
from .models import Loss
from .ranks import UsageError
from .shapes import Shapes

WARM_UP = 1
"""Steps after the first, until DDP has built its buckets again, and memory is there."""
FEWEST, MOST = 2, 12
"""Timed steps of an exchange at a time."""

Mark = float | torch.cuda.Event


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Mark, second: Mark) -> float:
    if isinstance(first, torch.cuda.Event):
        assert isinstance(second, torch.cuda.Event)
        return 1e-3 * float(first.elapsed_time(second))
    assert isinstance(second, float)
    return second - first


class Silent(DistributedExchange):
    """The exchange of a rank whose peers all send what it sends, at once."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup, ranks: int, marks: list[Mark]) -> None:
        """Takes a group of this rank alone, the number of peers to pretend, and a list for the start of each bucket."""
        self._ranks, self._marks, self._of = ranks, marks, device
        super().__init__(device, group)

    @property
    def topology(self) -> Topology:
        """That of so many ranks."""
        return Topology.flat(0, self._ranks)

    def start(
        self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None
    ) -> DistributedTransfer:
        """Notes the time, and fills all rows with this rank's payload."""
        self._marks.append(_mark(self._of))
        if payload is not None and gathered is not None:
            gathered.copy_(payload.expand_as(gathered))
        return DistributedTransfer([], self._stream)


@dataclass
class Rehearsed:
    """Steps of one way to exchange, without the network."""

    durations: list[float] = field(default_factory=list)
    """Seconds of each step, of the slowest rank."""
    starts: list[list[float]] = field(default_factory=list)
    """When each bucket's exchange could begin, step by step, in seconds before the last one's: negative, then 0."""

    @property
    def seconds(self) -> float:
        """Seconds of a step; the median."""
        return statistics.median(self.durations)

    @property
    def ready(self) -> list[float]:
        """When each bucket's exchange can begin; the medians."""
        return [statistics.median(bucket) for bucket in zip(*self.starts, strict=True)]


@dataclass
class _Hook:
    """What the hooks of dense exchanges share."""

    marks: list[Mark]
    buckets: list[list[nn.Parameter]]
    device: torch.device
    ranks: int

    def note(self, bucket: dist.GradBucket) -> None:
        self.marks.append(_mark(self.device))
        self.buckets.append([p for p in bucket.parameters() if isinstance(p, nn.Parameter)])


def _done(buffer: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[buffer.device] if buffer.device.type == "cuda" else None
    )
    future.set_result(buffer)
    return future


def _float32(hook: _Hook, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    hook.note(bucket)
    return _done(bucket.buffer())


def _half(hook: _Hook, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer()
    small = buffer.to(half_of_backend()).div_(hook.ranks)
    hook.note(bucket)
    return _done(buffer.copy_(small))


Way = str | float
"""An exchange to rehearse: ALONE, FLOAT32, HALF, or a density of DGC."""
ALONE = "alone"


class Rehearsal:
    """A model, and the ranks that train it."""

    def __init__(
        self, module: nn.Module, loss: Loss, device: torch.device, optimizer: str, names: Sequence[str]
    ) -> None:
        """Makes a group of this rank alone; a collective.

        Args:
            module: on the device.
            loss: runs it on this rank's data.
            device: of both.
            optimizer: "sgd" or "adamw".
            names: of the trainable parameters, as the plan calls them.
        """
        self._module, self._loss, self._device, self._optimizer = module, loss, device, optimizer
        self._ranks = dist.get_world_size()
        self._group = dist.new_subgroups(1)[0]
        trainable = [p for p in module.parameters() if p.requires_grad]
        self._names = dict(zip(trainable, names, strict=True))
        self.found: dict[Way, Rehearsed] = {}
        """What each way took."""
        self.buckets: list[Shapes] = []
        """DDP's, in the order in which it sends them; known once FLOAT32 has been rehearsed."""

    def rehearse(self, way: Way, seconds: float) -> None:
        """Takes steps for about so many seconds, and adds them to those taken before; a collective.

        Args:
            way: of exchanging.
            seconds: for warming up and measuring; some steps are taken in any case. The longest of all ranks counts.
        """
        marks: list[Mark] = []
        hook = _Hook(marks, [], self._device, self._ranks)
        model = DistributedDataParallel(self._module, process_group=self._group, gradient_as_bucket_view=True)
        optimizer = self._made(isinstance(way, float))
        if isinstance(way, float):
            silent = Silent(self._device, self._group, self._ranks, marks)
            DGCState(model.named_parameters(), optimizer, DGCConfig(density=way), exchange=silent).register(model)
        elif way != ALONE:
            model.register_comm_hook(hook, _float32 if way == FLOAT32 else _half)

        def step() -> None:
            optimizer.zero_grad()
            with model.no_sync() if way == ALONE else nullcontext():
                self._loss(model).backward()
            optimizer.step()

        found = self.found.setdefault(way, Rehearsed())
        self._time(step, seconds, marks, found)
        if way == FLOAT32:
            latest = hook.buckets[-len(found.ready) :]
            self.buckets = [{self._names[p]: tuple(p.shape) for p in bucket} for bucket in latest]
        optimizer.zero_grad()

    def _time(self, step: Callable[[], object], seconds: float, marks: list[Mark], found: Rehearsed) -> None:
        try:
            step()
        except RuntimeError as error:
            raise UsageError(
                f"--model: expected a model that takes a training step under DDP, got {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        for _ in range(WARM_UP):
            [one] = slowest([timed(step)])
        # Each rank has looked at its own clock: the number of steps, which are collectives, is agreed upon here.
        [wanted] = slowest([seconds / one])
        count = min(max(int(wanted) - WARM_UP - 1, FEWEST), MOST)
        own: list[float] = []
        for _ in range(count):
            marks.clear()
            own.append(timed(step))
            wait_for_device()
            found.starts.append([_between(marks[-1], mark) for mark in marks])
        found.durations += slowest(own)

    def _made(self, ours: bool) -> torch.optim.Optimizer:
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        # A rate of 0 would do, but the arithmetic of small numbers differs; so would growing weights.
        if self._optimizer == "sgd":
            kind = SGD if ours else torch.optim.SGD
            return kind(parameters, lr=1e-4, momentum=0.9)
        return AdamW(parameters, lr=1e-5) if ours else torch.optim.AdamW(parameters, lr=1e-5, fused=True)
