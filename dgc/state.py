"""DGCState: the one place that knows the order of the steps: clip, accumulate, select, pack, exchange, unpack."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.profiler import record_function

from . import ddp
from .config import DGCConfig
from .exchange.base import DistributedExchange, Exchange, Transfer
from .memory import share as shares
from .memory.memory import Memory
from .memory.parameters import Parameters
from .memory.share import Share
from .optim import foreign
from .optim.sgd import SGD, all_zero
from .stats import Stats
from .step import advice
from .step import log as report
from .step.bucket import Bucket, Gradients
from .step.clip import clip_scale, squared_norm
from .step.layouts import Buckets
from .step.lifecycle import Backward, Stage
from .step.schedule import DensitySchedule

logger = logging.getLogger("dgc")


class DGCState:
    """Reduces gradients by Deep Gradient Compression, and holds what has not been sent yet.

    All ranks compare configuration and parameters before the first exchange: in register(), or with process_group
    already here, or in the first backward pass.

    Args:
        named_parameters: the model's, all of them. "module." in front of every name and "_orig_mod." do not matter.
        optimizer: that applies the gradients. With dgc.SGD, momentum is corrected; an optimizer without momentum gets
            plain accumulation (paper, Algorithm 1). One that wraps another, as Accelerate's, is unwrapped.
        config: the same on all ranks.
        process_group: None for the group of the DDP module that the state is registered on.
        grad_scaler: the torch.amp.GradScaler that scales the loss. Gradients are unscaled before they are accumulated,
            and results handed back at its scale, so that scaler.step(optimizer) and scaler.update() work as always.
        exchange: how ranks talk where it is not torch.distributed; for adapters of other frameworks.
        average: False where the update is the sum of the ranks' gradients, not their mean (Horovod's op=Sum).

    Raises:
        ValueError: parameters that are missing, double, of an unsupported type or on several devices; an optimizer
            with momentum of its own; ranks that differ.
        TypeError: an argument is something else; the message says what to write.
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
        if config is not None and not isinstance(config, DGCConfig):
            write = "dgc.DGCConfig(**values)" if isinstance(config, Mapping) else "dgc.DGCConfig(density=0.001)"
            raise TypeError(f"config: expected a DGCConfig or None, got {type(config).__name__}: write {write}")
        self._made_with = config or DGCConfig()
        self._config = self._made_with
        self._density: float | None = None  # what set_density() has set
        if grad_scaler is not None and not isinstance(grad_scaler, GradScaler):
            raise TypeError(f"grad_scaler: expected a torch.amp.GradScaler or None, got {type(grad_scaler).__name__}")
        self.grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        """The GradScaler that scales the loss; None without one, or where it is switched off."""
        self.parameters = Parameters(named_parameters, optimizer, self._config, self.grad_scaler is not None)
        """The model's parameters by name, and which of them are never compressed."""
        self._device = device = self.parameters.device
        self._exchange = exchange or DistributedExchange(device, process_group)
        self._average = average

        named = self.parameters.by_name
        self.memory = Memory(named, [name for name in named if name not in self.parameters.never_compressed], device)
        """u and v, the momentum and the residual of this rank."""
        if self.parameters.any_momentum:
            self.memory.allocate_momentum()
        if device.type != "cpu" and self._exchange.rank == 0:
            report.log_backend(device.type)

        self.step = 0
        """Backward passes reduced so far, without skipped ones: the position in the warm-up."""
        self.joined = False
        """Whether u and v are a share of what the ranks of a group have accumulated; not before the first regroup()."""
        self._dense = False
        self._model: weakref.ref[DistributedDataParallel] | None = None
        self._told: set[str] = set()  # what was warned of, once
        self._loaded_for: list[int] | None = None  # the ranks for which shares were chosen, before DDP's were known
        self._buckets = Buckets(self._config, self.parameters, self.memory, self._exchange)
        self._pass = Backward(0, stage=Stage.OVER)  # the last one
        self._late = device.type == "cuda"  # reading the device's verdict at once would wait for it
        self._error: Exception | None = None  # what was found late, until step() raises it
        self._dropped = 0  # a number for the gradients that were thrown away before the last step()
        self._stats = Stats()
        self._total_bytes = 0
        if not self._exchange.changed:
            self.regroup()
        # The optimizer does not own the state: a state that is dropped frees its memory at once.
        if isinstance(self.optimizer, SGD):
            self.optimizer.attach(self)
        else:
            foreign.watch(self.optimizer, self)

    def register(self, model: nn.Module) -> None:
        """Has a DDP module reduce its gradients by this state; a collective of DDP's process group.

        In place of `model.register_comm_hook(state, dgc.dgc_hook)`, which shows the state neither DDP's group nor its
        parameters: then both are looked at in the first backward pass.

        Args:
            model: a DistributedDataParallel module with the parameters that the state was made of. After
                torch.distributed was initialised again, the new one.

        Raises:
            TypeError: it is no DDP module.
            ValueError: it has other parameters, another hook, or another group than process_group; or ranks differ.
        """
        module = self.bind(model)
        if self.exchange.changed:
            self.regroup()
        ddp.register(self, module)

    def bind(self, model: nn.Module) -> DistributedDataParallel:
        """Takes the group of the DDP module that this state reduces for, and checks its parameters; returns it.

        Raises:
            TypeError, ValueError: as register().
        """
        module = ddp.check_module(self, model, self.parameters.by_name)
        loaded_alone = self.joined and self._loaded_for is not None
        if loaded_alone and ddp.ranks_of(module) != self._loaded_for:
            raise RuntimeError(advice.loaded_too_early())
        if isinstance(self._exchange, DistributedExchange):
            self._exchange.bind(module.process_group)
        self._model = weakref.ref(module)
        return module

    @property
    def model(self) -> DistributedDataParallel | None:
        """The DDP module whose gradients this reduces; None where there is none, or it is not known."""
        return None if self._model is None else self._model()

    @property
    def exchange(self) -> Exchange:
        """How ranks talk. Until they have agreed, it looks each time where it is."""
        if not self.joined and self._exchange.changed:
            self._exchange.refresh()
            self._exchange.roll_back(self._exchange.rank, self._exchange.world_size)  # still to be agreed upon
        return self._exchange

    @property
    def optimizer(self) -> Optimizer:
        """What applies the gradients; without what wraps it."""
        return self.parameters.optimizer

    @property
    def config(self) -> DGCConfig:
        """The configuration that is in force, with the density of set_density()."""
        return self._config

    @config.setter
    def config(self, _: DGCConfig) -> None:
        raise AttributeError(
            "DGCState.config: expected to be read, got an assignment. It is read-only, since all ranks have to agree "
            "on it. Call state.set_density(density) on all ranks; for another field, make a new DGCState, between "
            "state.state_dict() and load_state_dict()"
        )

    @property
    def schedule(self) -> DensitySchedule:
        """Which density each step has; to be read."""
        return self._buckets.schedule

    def __repr__(self) -> str:
        """Says what is compressed, and where the run stands."""
        p = self.parameters
        compressed = len(p.by_name) - len(p.never_compressed)
        return (
            f"DGCState({compressed} of {len(p.by_name)} parameters compressed, density {self.density:g}, "
            f"step {self.step}, rank {self._exchange.rank} of {self._exchange.world_size})"
        )

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
        # What one rank has made alone, as by set_density() before the process group is there, joins as if new.
        nothing = self.step == 0 and self._exchange.world_size == 1 and self.memory.empty
        mine = self._share() if self.joined and not nothing else None
        before = self._exchange.rank, self._exchange.world_size
        self._exchange.refresh()
        try:
            scaled = self.grad_scaler is not None
            self._exchange.agree(report.description(self._made_with, self.optimizer, self.parameters.by_name, scaled))
            share = shares.regroup(self._exchange, self.memory, mine)
        except Exception:
            self._exchange.roll_back(*before)  # it is still that group's share
            raise
        if share is not None:
            self.step, self._dense = share.step, share.dense
            self._use_density(share.density)
        if share is None:  # all ranks are new
            self._exchange.agree({"density of set_density()": self._density})
        self.joined = True
        self._loaded_for = None
        self._dropped = 0
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
            self._begin(gradients)
        elif self._pass.stage is not Stage.OPEN:
            raise RuntimeError(
                "DGCState: expected the first bucket of a backward pass, got a later one: this pass has been "
                "discarded. Call zero_grad() and run another"
            )
        future = self.exchange.future()
        self._pass.reduced.update(map(id, gradients.parameters))
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

    def _begin(self, gradients: Gradients) -> None:
        if self._pass.stage is Stage.OPEN:
            raise RuntimeError(
                advice.broke_off(self.parameters.without_gradient(self._pass.reduced), self._exchange.go_on)
            )
        if isinstance(self.optimizer, SGD) and self.optimizer.reducer is not self:
            raise RuntimeError(advice.displaced())
        self._forget_skipped()
        if self._pass.stage is Stage.REDUCED:
            same_module = any(id(p) in self._pass.reduced for p in gradients.parameters)
            raise RuntimeError(advice.second_pass() if same_module else advice.second_module())
        try:
            self._settle()
        except (FloatingPointError, RuntimeError) as error:
            self._error = error  # for step(): DDP does not survive an error in the middle of a backward pass
        if self.exchange.changed:
            self.regroup()
        self.parameters.refresh()
        self._take_momentum()
        self._look_for_a_lost_residual()
        # The scaler's public way to its scale that does not wait for the device.
        one = torch.ones(1, dtype=torch.float32, device=self._device)
        self._pass = Backward(
            self.step,
            None if self.grad_scaler is None else self.grad_scaler.scale(one),
            look_for_changes=self.config.on_changed_gradient == "raise"
            or (self.config.on_changed_gradient == "warn" and "changed" not in self._told),
        )
        if self.parameters.any_momentum:
            self.memory.allocate_momentum()
        if self._buckets.enter(self.step, self._dense) and self.exchange.rank == 0:
            report.log_phase(self._buckets.phase, self.parameters.by_name, self.schedule, self.step, self._dense)

    def _take_momentum(self) -> None:
        """Takes over what a dense run has left in the optimizer."""
        if isinstance(self.optimizer, SGD):
            for p, buffer in self.optimizer.take_momentum().items():
                if (name := self.parameters.name_or_none(p)) is not None:  # not what is frozen by now
                    self.memory.set_momentum(name, buffer)

    def _look_for_a_lost_residual(self) -> None:
        if self.step == 0 and "residual" not in self._told:
            self._told.add("residual")
            if (steps := self.parameters.steps_taken) and self.exchange.rank == 0:
                warnings.warn(advice.residual_missing(steps), stacklevel=2)

    def _scale(self) -> Tensor | None:
        """Returns what this rank's gradients are multiplied with, float32 [1]; None for 1."""
        most = 1.0 if self._average else float(self.exchange.world_size)
        unscale = self._pass.unscale
        if self.config.clip_norm is None:
            if most != 1:
                scale = torch.full((1,), most, dtype=torch.float32, device=self._device)
                return scale if unscale is None else scale * unscale
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
            bucket.stamp(self.step, self._pass.loss_scale, self._dropped)
            bucket.compress(gradients, self.memory, factors, scale, self.parameters.nesterov)
            if self.memory.momentum is not None:
                self.memory.diverged.update(m.name for m in bucket.compressed)
        with record_function("dgc.exchange"):
            dense = bucket.load_dense(gradients, self.memory, scale)
            transfer = self.exchange.start(bucket.name, bucket.payload, bucket.gathered, dense)
        self._pass.sent.append(future)
        # Runs in the backend's thread, or in exchange.finish(): local work only, it must never wait.
        its_pass = self._pass
        transfer.done.add_done_callback(lambda _: self._receive(bucket, gradients, its_pass, transfer, future))

    def _receive(
        self,
        bucket: Bucket,
        gradients: Gradients,
        its_pass: Backward,
        transfer: Transfer,
        future: Future[Tensor],
    ) -> None:
        try:
            with transfer.arrived(), record_function("dgc.unpack"):
                bucket.unpack(gradients, self.exchange.rank, its_pass.loss_scale)
                if not self._late:
                    bucket.findings(bucket.report.tolist())  # raises where a payload is wrong
                bucket.restore_unused(self.memory)
                bucket.store_dense(gradients, self.memory, its_pass.loss_scale)
                self.memory.diverged.difference_update(m.name for m in bucket.averaged)
                if bucket.compressed:
                    reduced = [gradients.of(m.index) for m in bucket.compressed]
                    witnesses = bucket.witnesses(gradients, its_pass.unscale)
                    its_pass.probes.take([m.name for m in bucket.compressed], reduced, witnesses, its_pass.step)
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
        if local := self.parameters.not_reduced(self._pass.reduced):
            raise ValueError(advice.not_reduced(local))
        self._pass.finish(self.exchange)
        verdict = self._pass.judge(self.parameters.by_name)
        thrown = [name for bucket in self._pass.buckets for name in bucket.thrown_away(self.parameters.by_name)]
        if not self._late and not verdict.findings():  # else the step is left out, whatever its gradients hold
            self._give_up([*thrown, *verdict.zeroed])
            self._look_at_changes(verdict.changed)
        else:
            self._give_up(thrown)
        self._pass.stage = Stage.TAKEN
        if not self._late:
            return self._settle()
        for bucket in self._pass.buckets:
            if (which := verdict.thrown_away(bucket)) is not None:
                bucket.give_up(self.memory, which)
            bucket.restore(self.memory, verdict.bad)
        return True

    def _why_nothing_is_pending(self) -> str:
        opened = self._pass.stage is Stage.OPEN
        missing = self.parameters.without_gradient(self._pass.reduced if opened else ())
        if opened or 0 < len(missing) < len(self.parameters.by_name):
            return advice.incomplete(missing, self._exchange.go_on)
        return advice.nothing_reduced(self.model is not None or bool(ddp.registered_on(self)))

    def _give_up(self, thrown: list[str]) -> None:
        """Drops this pass for parameters whose gradient is not there any more."""
        if thrown and not self.config.droppable:
            raise RuntimeError(advice.thrown_away(thrown))
        # The next header tells, so that a rank that does it alone is noticed before replicas part further.
        self._dropped = report.fingerprint(thrown) if thrown else 0
        for bucket in self._pass.buckets if thrown else ():
            bucket.drop(self.memory, thrown)

    def _look_at_changes(self, changed: list[str]) -> None:
        if not changed:
            return
        if self.config.on_changed_gradient == "raise":
            if self.pending:
                self.discard(drop_gradient=False)
            raise RuntimeError(advice.changed(changed))
        if "changed" not in self._told:  # on every rank: what one changes alone, the others do not see
            warnings.warn(advice.changed(changed), stacklevel=2)
        self._told.add("changed")

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
            if self._late:
                if verdict.zeroed and not self.config.droppable:
                    raise RuntimeError(advice.thrown_away(verdict.zeroed))
                self._look_at_changes(verdict.changed)
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
            'DGCConfig(on_nonfinite="skip"), which takes dgc.SGD; with loss scaling DGCState(grad_scaler=scaler)'
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
            self.discard(drop_gradient=False)
            self._log_skipped(found)

    def _settle_between_steps(self, method: str) -> None:
        """Reads the verdict on the last step, for a method that wants no update to be outstanding."""
        self._forget_skipped()
        if self._pass.outstanding:
            raise RuntimeError(
                f"DGCState.{method}: expected to be called between optimizer.step() and the next backward(), got a "
                "call between backward() and step(): call step() first, or, to leave this update out, "
                "state.discard(drop_gradient=False)"
            )
        self._settle()
        self._take_momentum()

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

    def take_for(self) -> None:
        """Claims the gradients for an optimizer that is not ours, before it applies them; see take()."""
        gradients = [p.grad for p in self.parameters.by_name.values() if p.grad is not None]
        if not self.pending and all_zero(gradients):
            return
        self.parameters.refresh()  # a schedule may have given it momentum
        if not (self.take() and self._settle()):  # it knows nothing of `skip`, and cannot leave the step out
            raise FloatingPointError(
                "DGCState: expected finite gradients, got some whose average or residual overflows, so this step must "
                f"not be applied, and {type(self.optimizer).__name__} cannot leave one out: lower the loss scale or "
                "the learning rate, clip with DGCConfig(clip_norm=...), or use dgc.SGD"
            )

    def discard(self, *, drop_gradient: bool | None = None) -> None:
        """Gives up the update of the last backward pass, for a loop that leaves step() out on all ranks alike.

        Call zero_grad() too. Gradients of dense parameters are dropped in any case, as DDP would.

        Args:
            drop_gradient: what becomes of the gradient of compressed parameters. False: what was sent returns to the
                residual, and the gradient stays accumulated in u and v, for later steps; nothing is lost. True: u and
                v are, bit for bit, what they were before the pass; takes DGCConfig(droppable=True). None: as False,
                with a warning that says so, once.

        Raises:
            ValueError: drop_gradient is True, and DGCConfig.droppable is not.
        """
        if drop_gradient and not self.config.droppable:
            raise ValueError(advice.not_droppable())
        last = self._pass
        if not last.outstanding:
            return  # a step() has taken it
        if drop_gradient is None and "kept" not in self._told:
            self._told.add("kept")
            if self.exchange.rank == 0:
                warnings.warn(advice.kept(), stacklevel=2)
        reduced = self.pending
        last.abandon(self.exchange)
        if drop_gradient:
            last.drop(self.memory)
        else:
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

    def set_density(self, density: float) -> None:
        """Changes the density from the next step on; a collective, between step() and the next backward().

        The schedule of the warm-up goes on, towards the new density. It is part of state_dict(), and so of every
        checkpoint.

        Args:
            density: as DGCConfig.density, the same on all ranks.

        Raises:
            ValueError: it is out of range, or ranks differ; then nothing has changed.
            RuntimeError: an update is outstanding.
        """
        density = replace(self._made_with, density=density).density  # checks it
        self._settle_between_steps("set_density")
        if self.exchange.changed:
            self.regroup()
        self.exchange.agree({"density": density})
        self._use_density(density)

    def _use_density(self, density: float | None) -> None:
        if density != self._density:
            self._density = density
            self._config = self._made_with if density is None else replace(self._made_with, density=density)
            self._buckets.use(self._config)

    @property
    def steps_alone_matter(self) -> bool:
        """Whether the optimizer keeps something between steps that a rank without step() would not have."""
        return self.parameters.steps_alone_matter

    @property
    def residual_norm(self) -> float:
        """Euclidean norm of everything that waits in v, now. Reads all of v: not for every step."""
        return float(torch.linalg.vector_norm(self.memory.residual, dtype=torch.float64))

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
            self.exchange.world_size,
            steps=self.step,
            total_bytes_sent=self._total_bytes,
            skipped=skipped,
        )

    # What is saved.

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's momentum and residual by parameter name, and its step; each rank saves its own.

        Tensors are views, not copies. torch.load(weights_only=True) reads it back. torch.distributed.checkpoint keeps
        all ranks' apart, and loads them on as many ranks.

        Raises:
            RuntimeError: between backward() and step(): what was sent would be in neither the residual nor the model.
            FloatingPointError, PayloadError: on a GPU, what the next step() would have raised.
        """
        return shares.wrap({self.exchange.rank: self._own()})

    def full_state_dict(self) -> dict[str, Any]:
        """Returns on rank 0 what load_state_dict() takes on any number of ranks, and {} elsewhere; a collective.

        For frameworks where rank 0 writes one file. Tensors are copies on the CPU, 8 bytes a parameter and rank.

        Raises:
            RuntimeError, FloatingPointError, PayloadError: as state_dict().
        """
        if self.exchange.changed:
            self.regroup()
        return shares.gather(self.exchange, self.memory, self._own())

    def _own(self) -> dict[str, Any]:
        self._settle_between_steps("state_dict")
        return {**asdict(self._share()), **self.memory.state_dict()}

    def _share(self) -> Share:
        memory, exchange = self.memory, self.exchange
        return Share(
            *(exchange.rank, exchange.world_size, self.step, self._dense),
            *(sorted(memory.diverged), memory.momentum is not None, self._density),
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, allow_missing_ranks: bool = False
    ) -> None:
        """Takes up where state_dict() was saved. Changes nothing unless all of it fits.

        Args:
            state_dict: this rank's; or that of all ranks (full_state_dict(), or a list of theirs), for any number of
                ranks. Then this rank takes over its part of what waited, so that the mean over the ranks, what is
                still to come, is what it was (docs/reliability.md).
            allow_missing_ranks: goes on without the shares of ranks whose state_dict is not there, and logs what is
                lost.

        Raises:
            ValueError: it is of another model, version or rank, ranks are missing, or values are damaged; the message
                lists what differs.
        """
        state_dicts = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict or ())
        parts = [share for one in state_dicts for share in shares.unwrap(one)]
        place = self.exchange.rank, self.exchange.world_size
        self.take_up(shares.choose(self.memory, parts, *place, allow_missing_ranks))

    def take_up(self, choice: shares.Choice) -> None:
        """Takes up where a run stood, with what has been chosen for this rank; what was outstanding is forgotten."""
        self._pass.abandon(self.exchange)
        share = choice.share
        if self.exchange.changed and not self.joined and isinstance(self._exchange, DistributedExchange):
            self._loaded_for = self._exchange.ranks
        self.memory.load(choice.parts, share.diverged)
        if choice.missing:
            shares.log_lost(choice.missing, share.world_size)
        self.joined = True
        self.step, self._dense = share.step, share.dense
        self._use_density(share.density)
        if isinstance(self.optimizer, SGD):
            self.optimizer.take_momentum()  # of a dense run before; the momentum that counts has just been loaded
        self._told.add("residual")
        self._buckets.leave()
        self._pass = Backward(self.step, stage=Stage.OVER)
        self._error = None
        self._dropped = 0
        self._stats = replace(self._stats, steps=self.step)

    # Copies of the whole object.

    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickles: all but the process group, which is found again; between steps.

        Pickled together, model, optimizer and state belong together again: torch.save({"model": ddp, ...}).
        """
        share = self._own()
        for kind in ("momentum", "residual"):
            share[kind] = {name: tensor.clone() for name, tensor in share[kind].items()}
        if not isinstance(self._exchange, DistributedExchange):
            raise TypeError(
                "DGCState: expected torch.distributed's ranks to pickle it, got Horovod's. Use state_dict()"
            )
        arguments = {"config": self._made_with, "grad_scaler": self.grad_scaler, "average": self._average}
        return {"named": self.parameters.by_name, "optimizer": self.optimizer, "arguments": arguments, "share": share}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Makes a state that agrees with the other ranks at its first backward pass."""
        DGCState.__init__(self, saved["named"].items(), saved["optimizer"], **saved["arguments"])
        share = Share.of(saved["share"])
        self.take_up(shares.Choice(share, [(1.0, saved["share"])], []))
        self._exchange.roll_back(share.rank, share.world_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> ddp.Copy:
        """Returns no second u and v: who copies a model that carries the hook, as for an average of it, wants none."""
        return ddp.Copy()
