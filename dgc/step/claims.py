"""Claims: the end of a reduced backward pass, which step() claims or leaves out, or discard() gives up."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.amp import GradScaler

from dgc.exchange.base import Exchange
from dgc.memory.slots import Slot
from dgc.optim.apply import all_zero
from dgc.stats import Stats

from . import advice, log
from .agree import fingerprint
from .count import count
from .lifecycle import Pass, Stage
from .standing import Standing


class Claims:
    """The last backward pass, from its end to step(), or to discard() in place of it."""

    def __init__(self, standing: Standing, grad_scaler: GradScaler | None, average: bool, late: bool) -> None:
        """Starts without a pending pass.

        Args:
            standing: the state of the run, with memory, parameters and exchange.
            grad_scaler: the one that scales the loss; None without loss scaling.
            average: whether the update is the mean of the ranks' gradients, or their sum.
            late: whether the verdict on a step is read one pass later, so that the host does not wait for the GPU.
        """
        self._standing = standing
        self.grad_scaler = grad_scaler
        self._average = average
        self._late = late
        self._pass = Pass.none(0)
        self._error: Exception | None = None  # found late, and raised by the next step()
        self._told: set[str] = set()  # keys of the warnings given so far
        self._stats, self._total_bytes, self._forgotten = Stats(), 0, 0
        self._detached = False

    @property
    def exchange(self) -> Exchange:
        """The collectives of the ranks; RuntimeError after detach()."""
        if self._detached:
            raise RuntimeError(advice.detached())
        return self._standing.exchange

    def wait(self) -> None:
        """Completes all started transfers, where no thread of the framework does so."""
        self.exchange.finish()

    def slot(self, parameter: Tensor) -> Slot:
        """Returns where a parameter lies in memory, for Gradients.

        Raises:
            ValueError: named_parameters() did not have it, or it was frozen.
        """
        return self._standing.parameters.slot(parameter)

    # What the optimizer asks.

    def collect(self) -> None:
        """Does nothing: gradients are exchanged in the backward pass. DGCState can be told otherwise."""

    @property
    def pending(self) -> bool:
        """Whether there are reduced gradients that no step() has claimed."""
        return self._pass.stage is Stage.REDUCED

    @property
    def unscales(self) -> bool:
        """Whether gradients are unscaled, by the user's GradScaler, before they are accumulated."""
        return self.grad_scaler is not None

    @property
    def skip(self) -> Tensor | None:
        """The GPU's verdict on the claimed step, a uint8 scalar: not 0 if it must change nothing; None without one."""
        verdict = self._pass.verdict
        return verdict.bad if verdict is not None and self._pass.stage is Stage.TAKEN else None

    @property
    def keeps_state(self) -> bool:
        """Whether the optimizer keeps state between steps, which a rank without step() would miss."""
        return self._standing.parameters.rule.keeps_state

    def kept_of(self, parameter: Tensor) -> dict[str, Tensor] | None:
        """Returns the rule's tensors of a parameter that was sent dense; None for a compressed one."""
        slot = self.slot(parameter)
        # A rank without rows of a divided parameter applies the same update as the others.
        if slot.name not in self._standing.layouts.phase.dense or not slot.numel:
            return None
        self._standing.memory.allocate(self._standing.parameters.rule.kept)
        return self._standing.memory.of(slot.name)

    def take(self) -> bool:
        """Claims the reduced gradients for step(); returns False if all ranks have to leave the step out.

        On a GPU it returns True, and `skip` tells the device to leave the step out. The error is raised here one step
        later, and the update of that later step returns to the residual.

        Raises:
            RuntimeError: no backward pass was reduced since the last step(), or only a part of one, or a bucket of it
                failed; a compressed parameter has lost its gradient, and config.droppable is not set; or a gradient
                was changed since, and config.on_changed_gradient is "raise".
            ValueError: the optimizer holds a gradient that was not reduced.
            FloatingPointError: a rank's gradient was not finite, and config.on_nonfinite is "raise". Nothing was
                applied; finite entries stay accumulated.
        """
        if not self.pending:
            raise RuntimeError(self._why_nothing_is_pending())
        if self._error is not None:
            error, self._error = self._error, None
            self.discard(drop_gradient=False)
            raise error
        parameters = self._standing.parameters
        if local := parameters.not_reduced(self._pass.reduced):
            raise ValueError(advice.not_reduced(local))
        self._pass.finish(self.exchange)
        verdict = self._pass.judge(self.exchange, parameters.by_name)
        thrown = [name for bucket in self._pass.buckets for name in bucket.thrown_away(parameters.by_name)]
        if not self._late and not verdict.findings():  # else the step is left out, whatever its gradients hold
            self._drop([*thrown, *verdict.zeroed])
            self._look_at_changes(verdict.changed)
        else:
            self._drop(thrown)
        self._pass.claim()
        if not self._late:
            return self._settle()
        for bucket in self._pass.buckets:
            which = verdict.thrown_away(bucket)
            bucket.restore(verdict.bad) if which is None else bucket.give_back(which, verdict.bad)
        return True

    def take_for(self) -> None:
        """Claims the gradients for an optimizer that is not ours, before it applies them; see take()."""
        parameters = self._standing.parameters
        self.collect()
        if not self.pending and all_zero(parameters.by_name.values()):
            return
        parameters.refresh()  # a schedule may have set a momentum, which is refused
        if not (self.take() and self._settle()):  # the optimizer does not read `skip`, and cannot leave the step out
            raise FloatingPointError(advice.cannot_skip(type(parameters.optimizer).__name__))

    def _why_nothing_is_pending(self) -> str:
        opened = self._pass.stage is Stage.OPEN
        parameters = self._standing.parameters
        missing = parameters.without_gradient(self._pass.reduced if opened else ())
        if opened or 0 < len(missing) < len(parameters.by_name):
            return advice.incomplete(missing, self._standing.own_exchange.go_on)
        return advice.nothing_reduced(self.registered)

    @property
    def registered(self) -> bool:
        """Whether a framework passes gradients to this state; for messages."""
        return True

    def _drop(self, thrown: list[str]) -> None:
        """Drops this pass for parameters whose gradient was thrown away."""
        if thrown and not self._standing.config.droppable:
            raise RuntimeError(advice.thrown_away(thrown))
        # The next payload's header carries it, so that a single rank that does so is noticed before replicas diverge.
        self._standing.dropped = fingerprint(thrown) if thrown else 0
        for bucket in self._pass.buckets if thrown else ():
            bucket.drop(thrown)

    def _look_at_changes(self, changed: list[str]) -> None:
        if not changed:
            return
        if self._standing.config.on_changed_gradient == "raise":
            if self.pending:
                self.discard(drop_gradient=False)
            raise RuntimeError(advice.changed(changed))
        self._tell("changed", advice.changed(changed), everywhere=True)  # what one rank changes, the others do not see

    # What becomes of the last pass.

    def _settle(self) -> bool:
        """Reads the verdict on the last step, and returns whether it was applied; raises what take() raises."""
        last = self._pass
        if last.stage not in (Stage.TAKEN, Stage.SHADOW):
            return True
        shadow = last.stage is Stage.SHADOW
        verdict = last.settle(self.exchange)
        found = verdict.findings()
        if self._late and self._standing.config.droppable:
            for bucket in last.buckets:
                bucket.uncount(verdict.zeroed)  # the device has dropped their pass
        if not found:
            self._standing.layouts.learn(last.buckets)
            if self._late:
                if verdict.zeroed and not self._standing.config.droppable:
                    raise RuntimeError(advice.thrown_away(verdict.zeroed))
                self._look_at_changes(verdict.changed)
            return True
        for bucket in last.buckets if shadow or not self._late else ():
            bucket.restore()
        self._take_off_the_count()
        if shadow:
            return False
        if self._standing.config.on_nonfinite == "skip" or self.grad_scaler is not None:
            self._log_skipped(found)
            return False
        raise FloatingPointError(advice.not_finite(found, verdict.step))

    def _forget_skipped(self) -> None:
        """Discards a pass whose gradients are not finite, since GradScaler leaves its step out."""
        if self.grad_scaler is None or not self.pending:
            return
        try:
            self._pass.finish(self.exchange)
        except Exception:
            return  # backward() has raised it already; the caller reports that discard() was not called
        if found := self._pass.judge(self.exchange).findings():
            self.discard(drop_gradient=False)
            self._log_skipped(found)

    def settle_between_steps(self, method: str) -> None:
        """Reads the verdict on the last step, for a method that may be called between steps only.

        Raises:
            RuntimeError: an update is outstanding.
            FloatingPointError, PayloadError: on a GPU, what the next step() would have raised.
        """
        self._forget_skipped()
        if self._pass.outstanding:
            raise RuntimeError(advice.outstanding(method))
        self._settle()
        self._standing.take_what_was_brought()

    def discard(self, *, drop_gradient: bool | None = None) -> None:
        """Gives up the update of the last backward pass, for a loop that leaves step() out on all ranks alike.

        Call zero_grad() too. Gradients of dense parameters are dropped in any case, as with plain DDP.

        Args:
            drop_gradient: whether the gradient of compressed parameters is dropped. False: sent entries return to the
                residual, and the gradient stays accumulated in u and v, for later steps; nothing is lost. True: u and v
                become, bit for bit, what they were before the pass; this needs DGCConfig(droppable=True). None: as
                False, with a warning the first time.

        Raises:
            ValueError: drop_gradient is True, but DGCConfig.droppable is False.
        """
        if drop_gradient and not self._standing.config.droppable:
            raise ValueError(advice.not_droppable())
        if not self._pass.outstanding:
            return  # a step() has taken it
        if drop_gradient is None:
            self._tell("kept", advice.kept(), stacklevel=3)
        reduced = self.pending
        self._pass.abandon(self.exchange)
        for bucket in self._pass.buckets:
            bucket.drop() if drop_gradient else bucket.restore()
        if reduced:
            self._take_off_the_count()

    def regroup(self) -> None:
        """Agrees with all present ranks, and takes u and v over into their group; a collective.

        Call it after ranks have come or gone. Survivors' shares are rescaled so that the mean over the ranks stays the
        same. Newcomers start with zeros, at the survivors' step. Shares of ranks that left are lost, which is logged.

        Raises:
            ValueError: on every rank, where configurations or parameters differ.
            RuntimeError: an update is outstanding; or survivors come from different groups or steps.
            FloatingPointError, PayloadError: on a GPU, what the next step() would have raised.
        """
        self.settle_between_steps("regroup")
        self._standing.regroup()

    def _take_off_the_count(self) -> None:
        self._standing.step -= 1
        self._count(self._stats.skipped + 1)

    def _count(self, skipped: int) -> None:
        self._stats = count(
            self._pass.buckets,
            self._standing,
            inside=sum(one.node.bytes_inside for one in self._pass.inside),
            total_bytes_sent=self._total_bytes,
            forgotten=self._forgotten,
            skipped=skipped,
        )

    def _tell(self, what: str, message: str, everywhere: bool = False, stacklevel: int = 4) -> None:
        if what not in self._told and (everywhere or self.exchange.rank == 0):
            warnings.warn(message, stacklevel=stacklevel)
        self._told.add(what)

    def _log_skipped(self, found: list[str]) -> None:
        if self.exchange.rank == 0:  # every rank knows what all have sent
            log.log_skipped(self._standing.step, found, expected=self.grad_scaler is not None)
