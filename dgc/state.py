"""DGCState: the one place that knows the order of the steps: clip, accumulate, select, pack, exchange, unpack."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
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
from .bucket import Bucket, Gradients, Member
from .clip import clip_scale, squared_norm
from .config import DGCConfig
from .exchange import DistributedExchange, Exchange, Transfer
from .memory import Memory, return_free_memory
from .optim import SGD, all_zero
from .parameters import Parameters
from .phase import Phase, phase_at
from .schedule import DensitySchedule, entries
from .share import Share
from .stats import Stats
from .verdict import Verdict

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
        self.parameters = Parameters(named_parameters, optimizer, self.config)
        if grad_scaler is not None and not isinstance(grad_scaler, GradScaler):
            raise TypeError(f"grad_scaler: expected a torch.amp.GradScaler or None, got {type(grad_scaler).__name__}")
        self.grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
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
        self._phase_key: tuple[object, ...] = ()
        self._phase: Phase
        self._buckets: dict[tuple[int, ...], Bucket] = {}
        self._reduced: dict[tuple[int, ...], Bucket] = {}  # those of this backward pass
        self._waiting: list[tuple[Gradients, Future[Tensor]]] = []
        self._sent: list[Future[Tensor]] = []  # of this backward pass
        self._open = False  # between the first and the last bucket of a backward pass
        self._pending = False  # gradients were reduced that no step() has taken
        self._loss_scale: Tensor | None = None  # of this backward pass, float32 [1]
        self._shadow = False  # the last backward pass has no step() on this rank
        self._late = device.type == "cuda"  # reading the device's verdict at once would wait for it
        self._verdict: Verdict | None = None  # of the last step, not read yet
        self._error: Exception | None = None  # what that verdict was, until step() raises it
        self._stats = Stats()
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
        self._forget_skipped()
        if self._pending:
            raise RuntimeError(
                "DGCState.regroup: expected to be called between optimizer.step() and the next backward(), got a call "
                "with an update outstanding: call step() first, or state.discard()"
            )
        self._settle()
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
        self._phase_key = ()

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
        elif not self._open:
            raise RuntimeError(
                "DGCState: expected the first bucket of a backward pass, got a later one: this pass has been "
                "discarded. Call zero_grad() and run another"
            )
        future = self.exchange.future()
        self._waiting.append((gradients, future))
        if self.config.clip_norm is None or last:
            # Clipping needs the norm of all gradients, so all buckets wait for the last.
            scale = self._scale()
            waiting, self._waiting = self._waiting, []
            for waiting_gradients, waiting_future in waiting:
                self._send(waiting_gradients, scale, waiting_future)
        if last:
            self._end(shadow)
        return future

    def _begin(self) -> None:
        if self._open:
            raise RuntimeError(
                "DGCState: expected the last backward pass to be complete, but it broke off, and what it sent is in "
                "neither the residual nor the model. Call state.discard(), which takes it back, and zero_grad()"
            )
        self._forget_skipped()
        if self._pending:
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
        self._open = True
        if self.grad_scaler is not None:
            # Its public way to the scale that does not wait for the device.
            self._loss_scale = self.grad_scaler.scale(torch.ones(1, device=self._device))
        self._reduced = {}
        self._sent = []
        if self.memory.momentum is None and self.parameters.any_momentum:
            self.memory.allocate_momentum()
            self._buckets.clear()  # they keep no room for masked momentum
        key = (self.density, self.schedule.warming_up(self.step), self._dense)
        if key != self._phase_key:
            self._phase_key = key
            self._phase = phase_at(
                self.step,
                self.config,
                self.parameters.by_name,
                self.parameters.never_compressed,
                self.exchange.world_size,
                self._dense,
            )
            self._buckets.clear()
            return_free_memory()
            if self.exchange.rank == 0:
                report.log_phase(self._phase, self.parameters.by_name, self.schedule, self.step, self._dense)

    def _scale(self) -> Tensor | None:
        """Returns what this rank's gradients are multiplied with, float32 [1]; None for 1."""
        most = 1.0 if self._average else float(self.exchange.world_size)
        # As GradScaler does it, so that both unscale to the same bits.
        unscale = None if self._loss_scale is None else self._loss_scale.double().reciprocal().float()
        if self.config.clip_norm is None:
            if most != 1:
                return torch.full((1,), most, device=self._device) * (1 if unscale is None else unscale)
            return unscale
        with record_function("dgc.clip"):
            norms = {
                self.parameters.name(p): squared_norm(gradients.of(i))
                for gradients, _ in self._waiting
                for i, p in enumerate(gradients.parameters)
            }
            ordered = [norms[name] for name in self.parameters.by_name if name in norms]
            return clip_scale(ordered, self.config.clip_norm, self.exchange.world_size, most, unscale)

    def _send(self, gradients: Gradients, scale: Tensor | None, future: Future[Tensor]) -> None:
        bucket = self._bucket(gradients)
        with record_function("dgc.accumulate_select_pack"):
            factors = [self.parameters.momentum(m.name) for m in bucket.compressed]
            bucket.compress(gradients, self.memory, factors, scale, self.parameters.nesterov, self.step)
            if self.memory.momentum is not None:
                self.memory.diverged.update(m.name for m in bucket.compressed)
        with record_function("dgc.exchange"):
            dense = bucket.load_dense(gradients, self.memory, scale)
            transfer = self.exchange.start(bucket.name, bucket.payload, bucket.gathered, dense)
        self._sent.append(future)
        # Runs in the backend's thread, or in exchange.finish(): local work only, it must never wait.
        transfer.done.add_done_callback(lambda _: self._receive(bucket, gradients, transfer, future))

    def _receive(self, bucket: Bucket, gradients: Gradients, transfer: Transfer, future: Future[Tensor]) -> None:
        try:
            with transfer.arrived(), record_function("dgc.unpack"):
                bucket.unpack(gradients, self.exchange.rank, self._loss_scale)
                if not self._late:
                    bucket.findings(bucket.report.tolist())  # raises where a payload is wrong
                bucket.restore_unused(self.memory)
                bucket.store_dense(gradients, self.memory, self._loss_scale)
                self.memory.diverged.difference_update(m.name for m in bucket.averaged)
                future.set_result(gradients.buffers[0])
        except Exception as error:
            # Left to itself, an exception in a callback would leave backward() waiting past every timeout.
            future.set_exception(error)  # type: ignore[arg-type]  # torch's annotation is wrong

    def _end(self, shadow: bool) -> None:
        self._open = False
        self._pending = not shadow
        self._shadow = shadow
        self.step += 1
        # DDP changes its buckets after the first pass: the old ones' buffers go. Momentum is averaged only once.
        self._buckets = {key: bucket for key, bucket in self._reduced.items() if not bucket.averaged}
        self._total_bytes += report.bytes_sent(self._reduced.values(), self.exchange.world_size)
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
        if not self._pending:
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
        self._finish()
        self._pending = False
        self._verdict = Verdict(list(self._reduced.values()), self.step - 1)
        if not self._late:
            return self._settle()
        for bucket in self._reduced.values():
            bucket.restore(self.memory, self._verdict.bad)
        return True

    def _finish(self) -> None:
        """Waits for what is under way."""
        self.exchange.finish()
        for future in self._sent:
            future.wait()
        self._sent = []  # they hold gradients

    @property
    def pending(self) -> bool:
        """Whether gradients were reduced that no step() has taken."""
        return self._pending

    @property
    def unscales(self) -> bool:
        """Whether gradients have a loss scale, of which this knows."""
        return self.grad_scaler is not None

    @property
    def skip(self) -> Tensor | None:
        """On a GPU, a uint8 scalar there: not 0 where the claimed step must change nothing. None on the CPU."""
        return self._verdict.bad if self._verdict is not None else None

    def _settle(self) -> bool:
        """Reads the verdict on the last step; returns whether it was applied, or raises what take() raises."""
        shadow, self._shadow = self._shadow, False
        if shadow:  # a rank that has left DDP's join: no step() claims it
            self._verdict = Verdict(list(self._reduced.values()), self.step - 1)
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return True
        found = verdict.findings()
        if not found:
            return True
        if shadow or not self._late:
            self._take_back()
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
        if self.grad_scaler is None or not self._pending:
            return
        try:
            self._finish()
        except Exception:
            return  # backward() has raised it, and what is wrong now is that nobody has called discard()
        if found := Verdict(list(self._reduced.values()), self.step - 1).findings():
            self.discard()
            self._log_skipped(found)

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
        if name not in self._phase.dense:
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
        if not self._pending and all_zero(gradients):
            return
        if not (self.take() and self._settle()):  # it knows nothing of `skip`, and cannot leave the step out
            raise FloatingPointError("DGCState: expected finite gradients, got a residual that overflows")

    def discard(self) -> None:
        """Gives up the update of the last backward pass: what was sent returns to the residual, nothing is lost.

        For a loop that leaves step() out on purpose, on all ranks alike; call zero_grad() too. The gradient itself
        stays accumulated in u and v, except that of dense parameters, which is dropped.
        """
        if not (self._open or self._pending):
            return  # nothing is outstanding: a step() has taken it
        self.exchange.finish()
        for future in self._sent:  # after a backward pass that broke off, nobody else has waited
            with suppress(Exception):  # a bucket that failed sent nothing that counts; its error is backward()'s
                future.wait()
        self._take_back()
        if self._pending:
            self.step -= 1
            self._stats = self._count(self._stats.skipped + 1)
        self._waiting = []
        self._open = self._pending = False

    def _take_back(self) -> None:
        for bucket in self._reduced.values():
            bucket.restore(self.memory)

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
        """Figures of the last backward pass."""
        if not self._late:  # on a GPU the step that is left out is counted one pass later
            self._forget_skipped()
        return self._stats

    def _bucket(self, gradients: Gradients) -> Bucket:
        key = tuple(map(id, gradients.parameters))
        bucket = self._buckets.get(key)
        if bucket is None:
            members = []
            for index, parameter in enumerate(gradients.parameters):
                name = self.parameters.name(parameter)
                k = None if name in self._phase.dense else entries(self._phase.density, parameter.numel())
                members.append(Member(name, index, k))
            bucket = Bucket(
                *(gradients, members, self.memory, self.exchange.world_size, self.exchange.reducible),
                *(self.config, self._phase.masking),
            )
            self._buckets[key] = bucket
        self._reduced[key] = bucket
        return bucket

    def _count(self, skipped: int) -> Stats:
        return report.count(
            self._reduced.values(),
            self._phase,
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
        self._forget_skipped()
        if self._open or self._pending:
            raise RuntimeError(
                "DGCState.state_dict: expected to be called between optimizer.step() and the next backward(), got a "
                "call with an update outstanding: call step() first, or state.discard()"
            )
        self._settle()
        return {"version": shares.VERSION, **asdict(self._share()), **self.memory.state_dict()}

    def _share(self) -> Share:
        memory, exchange = self.memory, self.exchange
        return Share(
            *(exchange.rank, exchange.world_size, self.step, self._dense),
            *(sorted(memory.diverged), memory.momentum is not None),
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, allow_missing_ranks: bool = False
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
        state_dicts = [state_dict] if isinstance(state_dict, Mapping) else state_dict
        place = self.exchange.rank, self.exchange.world_size
        self.take_up(shares.choose(self.memory, state_dicts, *place, allow_missing_ranks))

    def take_up(self, choice: shares.Choice) -> None:
        """Takes up where a run stood, with what has been chosen for this rank; what was outstanding is forgotten."""
        self.exchange.finish()
        share = choice.share
        self.memory.load(choice.parts, share.diverged)
        if choice.missing:
            shares.log_lost(choice.missing, share.world_size)
        self.joined = True
        self.step, self._dense = share.step, share.dense
        self._phase_key = ()
        self._buckets.clear()
        self._reduced = {}
        self._waiting = []
        self._verdict = self._error = None
        self._open = self._pending = self._shadow = False
