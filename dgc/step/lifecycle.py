"""Backward: one backward pass, from its first bucket until a step has applied its gradients or has left them out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import Enum, auto

from torch import Tensor
from torch.futures import Future

from dgc.exchange.base import Exchange
from dgc.memory.memory import Memory

from .bucket import Bucket, Gradients
from .probes import Probes
from .verdict import Verdict


class Stage(Enum):
    """Where a backward pass stands."""

    OPEN = auto()
    """Between its first and its last bucket."""
    REDUCED = auto()
    """No step() has taken its gradients yet."""
    SHADOW = auto()
    """No step() will take them: this rank has left DDP's join."""
    TAKEN = auto()
    """A step() has, and the host has not read yet what the device found."""
    OVER = auto()


class Backward:
    """One backward pass: its gradients on their way, its buckets, and whether a step may apply them."""

    def __init__(
        self,
        step: int,
        loss_scale: Tensor | None = None,
        stage: Stage = Stage.OPEN,
        look_for_changes: bool = False,
    ) -> None:
        """Begins a pass.

        Args:
            step: which it is, without those that were left out.
            loss_scale: float32 [1], what its gradients are multiplied with; None for 1.
            stage: OVER for one that stands for none.
            look_for_changes: whether gradients that are changed before step() are to be noticed.
        """
        self.step = step
        self.loss_scale = loss_scale
        self.stage = stage
        self.waiting: list[tuple[Gradients, Future[Tensor]]] = []
        """Gradients that wait for the last ones, with the futures of their results."""
        self.sent: list[Future[Tensor]] = []
        """Of results that nobody has waited for."""
        self.buckets: list[Bucket] = []
        self.reduced: set[int] = set()
        """Ids of the parameters whose gradients came."""
        self.probes = Probes(look_for_changes)
        """What its gradients were when they were handed back."""
        self.verdict: Verdict | None = None

    @property
    def outstanding(self) -> bool:
        """Whether what it has sent is in neither the residual nor the model."""
        return self.stage in (Stage.OPEN, Stage.REDUCED)

    @property
    def unscale(self) -> Tensor | None:
        """Inverse of the loss scale, float32 [1]: as GradScaler takes it, so that both unscale to the same bits."""
        return None if self.loss_scale is None else self.loss_scale.double().reciprocal().float()

    def finish(self, exchange: Exchange) -> None:
        """Waits for all that is under way.

        Raises:
            RuntimeError: the exchange of a bucket failed; PayloadError: a rank sent what does not fit.
        """
        exchange.finish()
        for future in self.sent:
            future.wait()
        self.sent = []  # they hold gradients

    def abandon(self, exchange: Exchange) -> None:
        """Waits for all that is under way, whatever comes of it, so that nothing of it comes later."""
        exchange.finish()
        for future in self.sent:  # after a pass that broke off, nobody else has waited
            with suppress(Exception):  # a bucket that failed sent nothing that counts; its error is backward()'s
                future.wait()
        self.waiting, self.sent = [], []
        self.stage = Stage.OVER

    def judge(self, parameters: Mapping[str, Tensor] | None = None) -> Verdict:
        """Collects what the buckets report, once all of them have been received.

        Args:
            parameters: by name, where the probes are to be compared with their gradients.
        """
        if parameters is None:
            self.verdict = Verdict(self.buckets, self.step)
        else:
            zeroed, changed = self.probes.zeroed(parameters), self.probes.compare(parameters, self.unscale)
            self.verdict = Verdict(self.buckets, self.step, zeroed, changed)
        return self.verdict

    def take_back(self, memory: Memory) -> None:
        """Returns what was sent, and is not applied, to u and v."""
        for bucket in self.buckets:
            bucket.restore(memory)

    def drop(self, memory: Memory) -> None:
        """Returns u and v to what they were before this pass."""
        for bucket in self.buckets:
            bucket.drop(memory)
