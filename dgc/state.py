"""DGCState: the one place that knows the order of the steps: clip, accumulate, select, pack, exchange, unpack."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.futures import Future
from torch.optim.optimizer import Optimizer
from torch.profiler import record_function

from . import report, wire
from . import share as shares
from .backward import Backward, Stage
from .bucket import Bucket, Gradients
from .buckets import Buckets
from .clip import clip_scale, squared_norm
from .config import DGCConfig
from .exchange import DistributedExchange, Exchange, Transfer
from .memory import Memory
from .optim import SGD, all_zero
from .parameters import Parameters
from .schedule import DensitySchedule
from .share import Share
from .stats import Stats

logger = logging.getLogger("dgc")


class DGCState:
    """Reduces gradients by Deep Gradient Compression, and holds what has not been sent yet.

    Making one is a collective: all ranks compare configuration and parameters. In an elastic Horovod run they do so in
    `regroup`.

    Args:
        named_parameters: the model's, all of them; "module." and "_orig_mod." in front of names do not matter.
        optimizer: that applies the gradients. With dgc.SGD, momentum is corrected; an optimizer without momentum gets
            plain accumulation (paper, Algorithm 1).
        config: the same on all ranks.
        process_group: DDP's; None for the default group.
        grad_scaler: the torch.amp.GradScaler that scales the loss. Gradients are unscaled before they are accumulated,
            and results handed back at its scale, so that scaler.step(optimizer) and scaler.update() work as always.
        exchange: how ranks talk where it is not torch.distributed; for adapters of other frameworks.
        average: False where the update is the sum of the ranks' gradients, not their mean (Horovod's op=Sum).

    Raises:
        ValueError: parameters that are missing, double, of an unsupported type or on several devices; an optimizer
            with momentum of its own; ranks that differ.
        TypeError: grad_scaler is none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        config: DGCConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        grad_scaler: GradScaler | None = None,
        exchange: Exchange | None = None,
        average: bool = True,
    ) -> None:
        """Checks everything, agrees with the other ranks, and allocates v (and u, where there is momentum)."""
        self.config = config or DGCConfig()
        self.schedule = DensitySchedule(self.config)
        self.optimizer = optimizer
        if grad_scaler is not None and not isinstance(grad_scaler, GradScaler):
            raise TypeError(f"grad_scaler: expected a torch.amp.GradScaler or None, got {type(grad_scaler).__name__}")
        self.grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self.parameters = Parameters(named_parameters, optimizer, self.config, self.grad_scaler is not None)
        self._device = device = self.parameters.device
        self.exchange = exchange or DistributedExchange(device, process_group)
        self._average = average

        named = self.parameters.by_name
        self.memory = Memory(named, [name for name in named if name not in self.parameters.never_compressed], device)
        if self.parameters.any_momentum:
            self.memory.allocate_momentum()
        if device.type != "cpu" and self.exchange.rank == 0:
            report.log_backend(device.type)

        self.step = 0
        """Backward passes reduced so far, without skipped ones: the position in the warm-up."""
        self.joined = False
        """Whether u and v are a share of what the ranks of a group have accumulated; not before the first regroup()."""
        self._dense = False
        self._buckets = Buckets(self.config, self.parameters, self.memory, self.exchange)
        self._pass = Backward(0, stage=Stage.OVER)  # the last one
        self._late = device.type == "cuda"  # reading the device's verdict at once would wait for it
        self._error: Exception | None = None  # what was found late, until step() raises it
        self._stats = Stats(_residual=self.memory.residual)
        self._total_bytes = 0
        if not self.exchange.elastic:
            self.regroup()
        if isinstance(optimizer, SGD):
            optimizer.attach(self)
        else:
            optimizer.register_step_pre_hook(self._before_foreign_step)

    def regroup(self) -> None:
        """Agrees with all ranks that are there now, and takes u and v over into their group; a collective.

        After ranks have come or gone: survivors' shares are rescaled so that the mean over the ranks stays the same,
        newcomers start with zeros and at the survivors' step, the shares of ranks that left are logged as lost.

        Raises:
            ValueError: on every rank, where configurations or parameters differ.
            RuntimeError: a reduced gradient is not applied yet; or survivors come from different groups or steps.
            FloatingPointError, PayloadError: on a GPU, what the next step() would have raised.
        """
        self._settle_between_steps("regroup")
        mine = self._share() if self.joined else None
        before = self.exchange.rank, self.exchange.world_size
        self.exchange.refresh()
        try:
            scaled = self.grad_scaler is not None
            self.exchange.agree(report.description(self.config, self.optimizer, self.parameters.by_name, scaled))
            share = shares.regroup(self.exchange, self.memory, mine)
        except Exception:
            self.exchange.roll_back(*before)  # it is still that group's share
            raise
        if share is not None:
            self.step, self._dense = share.step, share.dense
        self.joined = True
        self._buckets.leave()

    # One backward pass, in the order in which a gradient meets it.

    def reduce(self, gradients: Gradients, *, first: bool, last: bool, shadow: bool = False) -> Future[Tensor]:
        """Reduces one bucket of gradients in place.

        Args:
            gradients: the bucket. All ranks reduce the same buckets in the same order.
            first: whether it is the first one of a backward pass.
            last: whether it is the last one.
            shadow: no step() will follow on this rank (DDP's join).

        Returns:
            A future of gradients.buffers[0], completed when all buffers hold the result, or with the error.

        Raises:
            ValueError: a parameter that named_parameters did not have.
            RuntimeError: the gradients of the backward pass before have not been taken by a step(); or it broke off, or
                this one has been discarded.
        """
        if first:
            self._begin()
        elif self._pass.stage is not Stage.OPEN:
            raise RuntimeError(
                "DGCState: expected the first bucket of a backward pass, got a later one: this pass has been "
                "discarded. Call zero_grad() and run another"
            )
        future = self.exchange.future()
        self._pass.waiting.append((gradients, future))
        if self.config.clip_norm is None or last:
            # Clipping needs the norm of all gradients, so all buckets wait for the last.
            scale = self._scale()
            waiting, self._pass.waiting = self._pass.waiting, []
            for waiting_gradients, waiting_future in waiting:
                self._send(waiting_gradients, scale, waiting_future)
        if last:
            self._end(shadow)
        return future

    def _begin(self) -> None:
        if self._pass.stage is Stage.OPEN:
            raise RuntimeError(
                "DGCState: expected the last backward pass to be complete, but it broke off, and what it sent is in "
                "neither the residual nor the model. Call state.discard(), which takes it back, and zero_grad()"
            )
        self._forget_skipped()
        if self._pass.stage is Stage.REDUCED:
            raise RuntimeError(
                "DGCState: expected optimizer.step() after the last backward pass, got another backward pass: its "
                "gradients would carry the averaged ones into the residual. To accumulate, run all but the last "
                "backward under model.no_sync() (Horovod: backward_passes_per_step); to drop an update on purpose, "
                "call state.discard() and zero_grad()"
            )
        try:
            self._settle()
        except (FloatingPointError, wire.PayloadError) as error:
            self._error = error  # for step(): DDP does not survive an error in the middle of a backward pass
        if self.exchange.changed:
            self.regroup()
        # The scaler's public way to its scale that does not wait for the device.
        scale = None if self.grad_scaler is None else self.grad_scaler.scale(torch.ones(1, device=self._device))
        self._pass = Backward(self.step, scale)
        if self.parameters.any_momentum:
            self.memory.allocate_momentum()
        if self._buckets.enter(self.step, self._dense) and self.exchange.rank == 0:
            report.log_phase(self._buckets.phase, self.parameters.by_name, self.schedule, self.step, self._dense)

    def _scale(self) -> Tensor | None:
        """Returns what this rank's gradients are multiplied with, float32 [1]; None for 1."""
        most = 1.0 if self._average else float(self.exchange.world_size)
        unscale = self._pass.unscale
        if self.config.clip_norm is None:
            if most != 1:
                return torch.full((1,), most, device=self._device) * (1 if unscale is None else unscale)
            return unscale
        with record_function("dgc.clip"):
            norms = {
                self.parameters.name(p): squared_norm(gradients.of(i))
                for gradients, _ in self._pass.waiting
                for i, p in enumerate(gradients.parameters)
            }
            ordered = [norms[name] for name in self.parameters.by_name if name in norms]
            return clip_scale(ordered, self.config.clip_norm, self.exchange.world_size, most, unscale)

    def _send(self, gradients: Gradients, scale: Tensor | None, future: Future[Tensor]) -> None:
        bucket = self._buckets.of(gradients)
        self._pass.buckets.append(bucket)
        with record_function("dgc.accumulate_select_pack"):
            factors = [self.parameters.momentum(m.name) for m in bucket.compressed]
            bucket.stamp(self.step, self._pass.loss_scale)
            bucket.compress(gradients, self.memory, factors, scale, self.parameters.nesterov)
            if self.memory.momentum is not None:
                self.memory.diverged.update(m.name for m in bucket.compressed)
        with record_function("dgc.exchange"):
            dense = bucket.load_dense(gradients, self.memory, scale)
            transfer = self.exchange.start(bucket.name, bucket.payload, bucket.gathered, dense)
        self._pass.sent.append(future)
        # Runs in the backend's thread, or in exchange.finish(): local work only, it must never wait.
        loss_scale = self._pass.loss_scale
        transfer.done.add_done_callback(lambda _: self._receive(bucket, gradients, loss_scale, transfer, future))

    def _receive(
        self,
        bucket: Bucket,
        gradients: Gradients,
        loss_scale: Tensor | None,
        transfer: Transfer,
        future: Future[Tensor],
    ) -> None:
        try:
            with transfer.arrived(), record_function("dgc.unpack"):
                bucket.unpack(gradients, self.exchange.rank, loss_scale)
                if not self._late:
                    bucket.findings(bucket.report.tolist())  # raises where a payload is wrong
                bucket.restore_unused(self.memory)
                bucket.store_dense(gradients, self.memory, loss_scale)
                self.memory.diverged.difference_update(m.name for m in bucket.averaged)
                future.set_result(gradients.buffers[0])
        except Exception as error:
            # Left to itself, an exception in a callback would leave backward() waiting past every timeout.
            future.set_exception(error)  # type: ignore[arg-type]  # torch's annotation is wrong

    def _end(self, shadow: bool) -> None:
        self._pass.stage = Stage.SHADOW if shadow else Stage.REDUCED
        self.step += 1
        self._buckets.keep(self._pass.buckets)  # DDP changes its buckets after the first pass
        self._total_bytes += report.bytes_sent(self._pass.buckets, self.exchange.world_size)
        self._stats = self._count(self._stats.skipped)

    # What the optimizer asks.

    def take(self) -> bool:
        """Claims the reduced gradients for step(); False if the step is to be left out, on all ranks alike.

        On a GPU the answer is True, `skip` tells the device, and what is wrong is raised here one step later; that
        step's update is given back too.

        Raises:
            RuntimeError: no backward pass was reduced since the last step(), or a bucket of it failed.
            ValueError: the optimizer holds a gradient that was not reduced.
            FloatingPointError: a rank's gradient was not finite, and config.on_nonfinite is "raise". Nothing was
                applied; finite entries stay accumulated.
        """
        if not self.pending:
            raise RuntimeError(
                "DGCState: expected a backward pass since the last step(), got none. Did it run under no_sync(), or "
                "is the hook missing? model.register_comm_hook(state, dgc.dgc_hook); with Horovod, "
                "dgc.horovod.DistributedOptimizer"
            )
        if self._error is not None:
            error, self._error = self._error, None
            self.discard()
            raise error
        self.parameters.check_gradients()
        self._pass.finish(self.exchange)
        verdict = self._pass.judge()
        self._pass.stage = Stage.TAKEN
        if not self._late:
            return self._settle()
        for bucket in self._pass.buckets:
            bucket.restore(self.memory, verdict.bad)
        return True

    @property
    def pending(self) -> bool:
        """Whether gradients were reduced that no step() has taken."""
        return self._pass.stage is Stage.REDUCED

    @property
    def unscales(self) -> bool:
        """Whether gradients have a loss scale, of which this knows."""
        return self.grad_scaler is not None

    @property
    def skip(self) -> Tensor | None:
        """On a GPU, a uint8 scalar there: not 0 where the claimed step must change nothing. None on the CPU."""
        verdict = self._pass.verdict
        return verdict.bad if verdict is not None and self._pass.stage is Stage.TAKEN else None

    def _settle(self) -> bool:
        """Reads the verdict on the last step; returns whether it was applied, or raises what take() raises."""
        last = self._pass
        if last.stage not in (Stage.TAKEN, Stage.SHADOW):
            return True
        shadow = last.stage is Stage.SHADOW
        verdict = last.judge() if shadow or last.verdict is None else last.verdict
        last.stage = Stage.OVER
        found = verdict.findings()
        if not found:
            return True
        if shadow or not self._late:
            last.take_back(self.memory)
        self.step -= 1
        self._stats = self._count(self._stats.skipped + 1)
        if shadow:
            return False
        if self.config.on_nonfinite == "skip" or self.grad_scaler is not None:
            self._log_skipped(found)
            return False
        raise FloatingPointError(
            f"DGCState: expected finite gradients, got Inf or NaN: {'; '.join(found)}, step {verdict.step}. Nothing "
            "was applied, and what was sent is back in the residual. Look at the loss; or leave such steps out: "
            'DGCConfig(on_nonfinite="skip"), with loss scaling DGCState(grad_scaler=scaler)'
        )

    def _forget_skipped(self) -> None:
        """Takes back the update of a step that GradScaler has left out, or is going to: its gradients hold NaN."""
        if self.grad_scaler is None or not self.pending:
            return
        try:
            self._pass.finish(self.exchange)
        except Exception:
            return  # backward() has raised it, and what is wrong now is that nobody has called discard()
        if found := self._pass.judge().findings():
            self.discard()
            self._log_skipped(found)

    def _settle_between_steps(self, method: str) -> None:
        """Reads the verdict on the last step, for a method that wants no update to be outstanding."""
        self._forget_skipped()
        if self._pass.outstanding:
            raise RuntimeError(
                f"DGCState.{method}: expected to be called between optimizer.step() and the next backward(), got a "
                "call with an update outstanding: call step() first, or state.discard()"
            )
        self._settle()

    def _log_skipped(self, found: list[str]) -> None:
        if self.exchange.rank == 0:  # it knows what every rank sent
            logger.log(
                logging.INFO if self.grad_scaler is not None else logging.WARNING,
                "dgc: step %d left out on all ranks, gradients not finite: %s",
                *(self.step, "; ".join(found)),
            )

    def dense_momentum(self, parameter: Tensor) -> Tensor | None:
        """Returns u of a parameter whose last gradient is a plain average; None if it is an update already."""
        name = self.parameters.name(parameter)
        if name not in self._buckets.phase.dense:
            return None
        self.memory.allocate_momentum()
        return self.memory.momentum_of(name)

    def _before_foreign_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                f"{type(self.optimizer).__name__}.step: expected no closure, since its backward pass would run after "
                "DGC's check of the gradients. Call backward() before step(), or use dgc.SGD"
            )
        gradients = [p.grad for p in self.parameters.by_name.values() if p.grad is not None]
        if not self.pending and all_zero(gradients):
            return
        if not (self.take() and self._settle()):  # it knows nothing of `skip`, and cannot leave the step out
            raise FloatingPointError("DGCState: expected finite gradients, got a residual that overflows")

    def discard(self) -> None:
        """Gives up the update of the last backward pass: what was sent returns to the residual, nothing is lost.

        For a loop that leaves step() out on purpose, on all ranks alike; call zero_grad() too. The gradient itself
        stays accumulated in u and v, except that of dense parameters, which is dropped.
        """
        last = self._pass
        if not last.outstanding:
            return  # a step() has taken it
        reduced = self.pending
        last.abandon(self.exchange)
        last.take_back(self.memory)
        if reduced:
            self.step -= 1
            self._stats = self._count(self._stats.skipped + 1)

    # What is sent how.

    @property
    def density(self) -> float:
        """Density of the next step."""
        return self.schedule.density(self.step)

    @property
    def dense(self) -> bool:
        """Whether DGC is switched off. Set it between steps, on all ranks alike.

        While it is True, gradients are averaged as DDP does. What waits in the residual stays there for the next
        compressed step: sent all at once it would wreck the model. Momentum that differs between ranks is averaged
        once.
        """
        return self._dense

    @dense.setter
    def dense(self, value: bool) -> None:
        self._dense = bool(value)

    @property
    def stats(self) -> Stats:
        """Figures of the last backward pass. One that GradScaler will leave out is taken back first, on the CPU."""
        if not self._late:  # on a GPU the step that is left out is counted one pass later
            self._forget_skipped()
        return self._stats

    def _count(self, skipped: int) -> Stats:
        return report.count(
            self._pass.buckets,
            self._buckets.phase,
            self.parameters.by_name,
            self.memory,
            self.exchange.world_size,
            steps=self.step,
            total_bytes_sent=self._total_bytes,
            skipped=skipped,
        )

    # What is saved.

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's momentum and residual by parameter name, and its step; each rank saves its own.

        Tensors are views, not copies. torch.load(weights_only=True) reads it back.

        Raises:
            RuntimeError: between backward() and step(): what was sent would be in neither the residual nor the model;
                or torch.distributed.checkpoint calls it.
            FloatingPointError, PayloadError: on a GPU, what the next step() would have raised.
        """
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.distributed.checkpoint"):
            raise RuntimeError(
                "torch.distributed.checkpoint: expected model and optimizer without the DGCState. It keeps one of the "
                "entries that all ranks have by the same name, and so one rank's residual of all. Write "
                "dgc.checkpoint.save(state, dir), and dgc.checkpoint.load(state, dir)"
            )
        self._settle_between_steps("state_dict")
        return {"version": shares.VERSION, **asdict(self._share()), **self.memory.state_dict()}

    def _share(self) -> Share:
        memory, exchange = self.memory, self.exchange
        return Share(
            *(exchange.rank, exchange.world_size, self.step, self._dense),
            *(sorted(memory.diverged), memory.momentum is not None),
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, allow_missing_ranks: bool = False
    ) -> None:
        """Takes up where state_dict() was saved. Changes nothing unless all of it fits.

        Args:
            state_dict: this rank's; or those of all ranks, for another number of ranks. Then this rank takes over its
                part of what waited, so that the mean over the ranks, what is still to come, is what it was
                (docs/reliability.md).
            allow_missing_ranks: goes on without the shares of ranks whose state_dict is not there, and logs what is
                lost.

        Raises:
            ValueError: it is of another model, version or rank, ranks are missing, or values are damaged; the message
                lists what differs.
        """
        state_dicts = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict or ())
        place = self.exchange.rank, self.exchange.world_size
        self.take_up(shares.choose(self.memory, state_dicts, *place, allow_missing_ranks))

    def take_up(self, choice: shares.Choice) -> None:
        """Takes up where a run stood, with what has been chosen for this rank; what was outstanding is forgotten."""
        self._pass.abandon(self.exchange)
        share = choice.share
        self.memory.load(choice.parts, share.diverged)
        if choice.missing:
            shares.log_lost(choice.missing, share.world_size)
        self.joined = True
        self.step, self._dense = share.step, share.dense
        self._buckets.leave()
        self._pass = Backward(self.step, stage=Stage.OVER)
        self._error = None
        self._stats = replace(self._stats, steps=self.step)
