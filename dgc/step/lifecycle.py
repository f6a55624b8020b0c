"""Pass: one backward pass as a state machine, from its first bucket until a step() has applied it or left it out.

    OPEN --close()--> REDUCED --claim()--> TAKEN --settle()--> OVER
      `----close()--> SHADOW --------------------settle()------^

abandon() leads from any stage to OVER.
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
from .node import Inside
from .probes import Probes
from .replicas import Replicas
from .verdict import Verdict


class Stage(Enum):
    """The stage of a backward pass."""

    OPEN = auto()
    """Between its first and its last bucket."""
    REDUCED = auto()
    """No step() has claimed its gradients yet."""
    SHADOW = auto()
    """No step() will claim its gradients, since this rank has run out of data in DDP's join()."""
    TAKEN = auto()
    """A step() has claimed its gradients, and the host has not read the verdict yet."""
    OVER = auto()


class Pass:
    """One backward pass: its gradients, its buckets, and the verdict on whether a step() may apply them."""

    def __init__(self, context: PassContext, shadow: bool = False) -> None:
        """Begins a pass.

        Args:
            context: the values that its buckets share.
            shadow: no step() will follow on this rank (DDP's join()).
        """
        self.context = context
        self._shadow = shadow
        self.waiting: list[tuple[Gradients, Future[Tensor]]] = []
        """Buckets that are not sent yet, with the futures of their results."""
        self.scattered: Inside | None = None
        """The bucket whose mean inside the node is under way."""
        self.inside: list[Inside] = []
        """Buckets that go through the node."""
        self.sent: list[Future[Tensor]] = []
        """Futures of results that have not been waited for."""
        self.buckets: list[Bucket] = []
        self.reduced: set[str] = set()
        """Names of the parameters whose gradients DDP or Horovod has passed."""
        self.replicas: Replicas | None = None
        """The comparison of the ranks' parameters, in a step that has one."""
        self.verdict: Verdict | None = None
        self._stage = Stage.OPEN

    @classmethod
    def none(cls, step: int) -> Pass:
        """Returns a pass that is over, to stand for none."""
        none = cls(PassContext(step, loss_scale=None, dropped=0, probes=Probes(stretches=False)))
        none._stage = Stage.OVER
        return none

    @property
    def stage(self) -> Stage:
        """The present stage."""
        return self._stage

    @property
    def outstanding(self) -> bool:
        """Whether its sent entries are in neither the residual nor the model."""
        return self._stage in (Stage.OPEN, Stage.REDUCED)

    # Transitions; nothing else writes the stage.

    def close(self, exchange: Exchange, late: bool) -> None:
        """Closes the pass after its last bucket; for a shadow a collective of ranks that hold the model together.

        Args:
            exchange: the collectives.
            late: whether step() reads its verdict one pass later.

        Raises:
            RuntimeError: the pass is not open.
            PayloadError: a rank sent what does not fit; only for a shadow.
        """
        self._expect(Stage.OPEN)
        self._stage = Stage.SHADOW if self._shadow else Stage.REDUCED
        if self._shadow and exchange.topology.places > 1:
            # The others of the node judge in step(), which never comes here, before they meet this rank elsewhere.
            verdict = self.judge(exchange)
            if not late:
                verdict.findings()

    def claim(self) -> None:
        """Gives the gradients to a step()."""
        self._expect(Stage.REDUCED)
        self._stage = Stage.TAKEN

    def settle(self, exchange: Exchange) -> Verdict:
        """Ends the pass, and returns its verdict."""
        self._expect(Stage.TAKEN, Stage.SHADOW)
        verdict = self.judge(exchange) if self.verdict is None else self.verdict
        self._stage = Stage.OVER
        return verdict

    def abandon(self, exchange: Exchange) -> None:
        """Ends the pass at any stage, after all of its started transfers have completed."""
        exchange.finish()
        for future in self.sent:  # after a pass that broke off, nothing else has waited for them
            with suppress(Exception):  # backward() raises the error of a bucket that failed
                future.wait()
        self.waiting, self.scattered, self.inside, self.sent = [], None, [], []
        self._stage = Stage.OVER

    def _expect(self, *stages: Stage) -> None:
        if self._stage not in stages:
            raise RuntimeError(f"Pass: expected {' or '.join(s.name for s in stages)}, got {self._stage.name}")

    def compares(self, replicas: Replicas | None) -> None:
        """Takes the comparison of this step; a rank that takes no part in it does not judge either."""
        if replicas is not None:
            self.sent.append(replicas.future)
            self.replicas = None if self._shadow else replicas

    def finish(self, exchange: Exchange) -> None:
        """Waits for all started transfers.

        Raises:
            RuntimeError: the exchange of a bucket failed.
            PayloadError: a rank sent what does not fit.
        """
        exchange.finish()
        for future in self.sent:
            future.wait()
        self.sent, self.inside = [], []  # the futures hold gradients

    def judge(self, exchange: Exchange, parameters: Mapping[str, Tensor] | None = None) -> Verdict:
        """Collects the reports of the buckets, once all of them have been received.

        Args:
            exchange: the collectives.
            parameters: by name, to compare their gradients with those handed back; None for no comparison.
        """
        zeroed: Mapping[str, Tensor] = {}
        changed: Mapping[str, Tensor] = {}
        if parameters is not None:
            zeroed = self.context.probes.zeroed(parameters)
            changed = self.context.probes.compare(parameters, self.context.unscale)
        self.verdict = Verdict(self.buckets, exchange, self.context.step, zeroed, changed, self.replicas)
        return self.verdict
