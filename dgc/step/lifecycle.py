"""Pass: one backward pass as a state machine, from its first bucket until a step has applied it or has left it out.

OPEN --close()--> REDUCED --claim()--> TAKEN --settle()--> OVER
`--> SHADOW ----------------------settle()--^
and abandon(), from anywhere to OVER
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import Enum, auto

from torch import Tensor
from torch.futures import Future

from dgc.exchange.base import Exchange
from dgc.memory.slots import Gradients

from .bucket import Bucket, PassContext
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


class Pass:
    """One backward pass: its gradients on their way, its buckets, and whether a step may apply them."""

    def __init__(self, context: PassContext, shadow: bool = False) -> None:
        """Begins a pass.

        Args:
            context: what all its buckets go by.
            shadow: no step() will follow on this rank (DDP's join).
        """
        self.context = context
        self._shadow = shadow
        self.waiting: list[tuple[Gradients, Future[Tensor]]] = []
        """Gradients that wait for the last ones, with the futures of their results."""
        self.sent: list[Future[Tensor]] = []
        """Futures of results that have not been waited for."""
        self.buckets: list[Bucket] = []
        self.reduced: set[str] = set()
        """Names of the parameters whose gradients came."""
        self.verdict: Verdict | None = None
        self._stage = Stage.OPEN

    @classmethod
    def none(cls, step: int) -> Pass:
        """Returns one that is over, where there has been none yet."""
        none = cls(PassContext(step, loss_scale=None, dropped=0, probes=Probes(stretches=False)))
        none._stage = Stage.OVER
        return none

    @property
    def stage(self) -> Stage:
        """Where it stands."""
        return self._stage

    @property
    def outstanding(self) -> bool:
        """Whether what it has sent is in neither the residual nor the model."""
        return self._stage in (Stage.OPEN, Stage.REDUCED)

    # Transitions; nothing else writes the stage.

    def close(self) -> None:
        """Ends it with its last bucket."""
        self._expect(Stage.OPEN)
        self._stage = Stage.SHADOW if self._shadow else Stage.REDUCED

    def claim(self) -> None:
        """Gives its gradients to a step()."""
        self._expect(Stage.REDUCED)
        self._stage = Stage.TAKEN

    def settle(self) -> Verdict:
        """Ends it, and returns what was found."""
        self._expect(Stage.TAKEN, Stage.SHADOW)
        verdict = self.judge() if self.verdict is None else self.verdict
        self._stage = Stage.OVER
        return verdict

    def abandon(self, exchange: Exchange) -> None:
        """Ends it wherever it stands; waits for all that is under way, so that nothing of it comes later."""
        exchange.finish()
        for future in self.sent:  # after a pass that broke off, nothing else has waited
            with suppress(Exception):  # a bucket that failed sent nothing that counts; its error is backward()'s
                future.wait()
        self.waiting, self.sent = [], []
        self._stage = Stage.OVER

    def _expect(self, *stages: Stage) -> None:
        if self._stage not in stages:
            raise RuntimeError(f"Pass: expected {' or '.join(s.name for s in stages)}, got {self._stage.name}")

    def finish(self, exchange: Exchange) -> None:
        """Waits for all that is under way.

        Raises:
            RuntimeError: the exchange of a bucket failed; PayloadError: a rank sent what does not fit.
        """
        exchange.finish()
        for future in self.sent:
            future.wait()
        self.sent = []  # they hold gradients

    def judge(self, parameters: Mapping[str, Tensor] | None = None) -> Verdict:
        """Collects what the buckets report, once all of them have been received.

        Args:
            parameters: by name, where their gradients are to be compared with what was handed back.
        """
        zeroed: Mapping[str, Tensor] = {}
        changed: Mapping[str, Tensor] = {}
        if parameters is not None:
            zeroed = self.context.probes.zeroed(parameters)
            changed = self.context.probes.compare(parameters, self.context.unscale)
        self.verdict = Verdict(self.buckets, self.context.step, zeroed, changed)
        return self.verdict
