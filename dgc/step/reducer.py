"""Reducer: the methods that a gradient goes through, in their order.

    begin() -> reduce(gradients), once a bucket -> end()      the backward pass, called by DDP's hook or by Horovod's
    take()                                                    step(), called by the optimizer; claims.py
    discard()                                                 in place of step(), called by the user; claims.py

All of them belong to one Pass.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.futures import Future
from torch.optim.optimizer import Optimizer
from torch.profiler import record_function

from dgc.config import DGCConfig
from dgc.exchange.base import Transfer
from dgc.memory.memory import Memory
from dgc.memory.parameters import Parameters
from dgc.memory.slots import Gradients

from . import advice, replicas
from .bucket import Bucket, PassContext
from .claims import Claims
from .clip import clip_scale, squared_norm
from .count import bytes_sent
from .lifecycle import Pass, Stage
from .node import Inside, gather
from .probes import Probes
from .schedule import DensitySchedule


class Reducer(Claims):
    """The backward pass: sends every bucket to the other ranks, and receives the averages."""

    # Where the run stands.

    @property
    def step(self) -> int:
        """Backward passes reduced so far, without skipped ones: the position in the warm-up."""
        return self._standing.step

    @property
    def joined(self) -> bool:
        """Whether u and v are this rank's share of a group's; False before ranks have agreed or a state was loaded."""
        return self._standing.joined

    @property
    def memory(self) -> Memory:
        """This rank's u and v."""
        return self._standing.memory

    @property
    def parameters(self) -> Parameters:
        """The trainable parameters by name, and which of them stay dense."""
        return self._standing.parameters

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that applies the gradients, without its wrappers."""
        return self._standing.parameters.optimizer

    @property
    def config(self) -> DGCConfig:
        """The configuration that is in force, with the density of set_density()."""
        return self._standing.config

    @config.setter
    def config(self, _: DGCConfig) -> None:
        raise AttributeError(advice.read_only())

    @property
    def schedule(self) -> DensitySchedule:
        """The density of each step; read-only."""
        return self._standing.layouts.schedule

    @property
    def density(self) -> float:
        """Density of the next step."""
        return self.schedule.density(self.step)

    @property
    def dense(self) -> bool:
        """Whether DGC is switched off. Set it between steps, on all ranks alike.

        While it is True, gradients are averaged as DDP averages them. The residual stays where it is until the next
        compressed step, since all of it at once would wreck the model. Momentum that differs between ranks is averaged
        once.

        Raises:
            RuntimeError: it is set between backward() and step(); or the ranks of a node divide memory.
        """
        return self._standing.dense

    @dense.setter
    def dense(self, value: bool) -> None:
        self._forget_skipped()
        if self._pass.outstanding:
            raise RuntimeError(advice.outstanding("dense"))
        if value and self._standing.divided:
            raise RuntimeError(advice.no_dense())
        self._standing.dense = bool(value)

    def set_density(self, density: float) -> None:
        """Changes the density from the next step on; a collective, between step() and the next backward().

        A warm-up continues towards the new density. The density is part of state_dict(), and so of every checkpoint.

        Args:
            density: as DGCConfig.density, the same on all ranks.

        Raises:
            ValueError: it is out of range, or ranks differ; then nothing has changed.
            RuntimeError: an update is outstanding.
        """
        density = self._standing.checked_density(density)
        self.settle_between_steps("set_density")
        self._standing.set_density(density)

    # The backward pass.

    def begin(self, shadow: bool = False) -> None:
        """Begins a backward pass.

        Args:
            shadow: no step() will follow on this rank (DDP's join()).

        Raises:
            RuntimeError: no step() has claimed the gradients of the last pass; or that pass broke off; or the optimizer
                has a DGCState that was made later.
        """
        standing = self._standing
        if self._pass.stage is Stage.OPEN:
            missing = standing.parameters.without_gradient(self._pass.reduced)
            raise RuntimeError(advice.broke_off(missing, standing.own_exchange.go_on))
        if not standing.parameters.rule.serves(self):
            raise RuntimeError(advice.displaced())
        self._forget_skipped()
        if self._pass.stage is Stage.REDUCED:
            raise RuntimeError(advice.second_pass())
        try:
            self._settle()
        except (FloatingPointError, RuntimeError) as error:
            self._error = error  # for step(): DDP does not survive an error in the middle of a backward pass
        if self.exchange.changed:
            self.regroup()
        standing.refresh()
        standing.take_what_was_brought()
        self._look_for_a_lost_residual()
        how = standing.config.on_changed_gradient
        looks = how == "raise" or (how == "warn" and "changed" not in self._told)
        # Scaling a 1 is the public way to read the scale without waiting for the device.
        one = torch.ones(1, dtype=torch.float32, device=standing.parameters.device)
        loss_scale = None if self.grad_scaler is None else self.grad_scaler.scale(one)
        self._pass = Pass(PassContext(standing.step, loss_scale, standing.dropped, Probes(looks)), shadow)
        standing.memory.allocate(standing.parameters.rule.kept)
        standing.enter()
        self._pass.compares(replicas.compare(standing, shadow))

    def reduce(self, gradients: Gradients) -> Future[Tensor]:
        """Reduces one bucket of gradients in place, between begin() and end().

        Args:
            gradients: the bucket. All ranks reduce the same buckets in the same order.

        Returns:
            A future of gradients.buffers[0], completed when all buffers hold the result, or with the error. Where
            gradients are clipped, all buckets wait for end().

        Raises:
            RuntimeError: the pass has been discarded.
        """
        if self._pass.stage is not Stage.OPEN:
            raise RuntimeError(advice.discarded())
        future = self.exchange.future()
        self._pass.reduced.update(slot.name for slot in gradients.slots)
        node = self._standing.layouts.node_of(gradients)
        if node is None:
            self._pass.waiting.append((gradients, future))
        else:
            # The mean of a bucket is under way while the next one's gradients are computed.
            self._take_from_node()
            self._pass.scattered = Inside(node, node.scatter(gradients), gradients, self.exchange.future(), future)
        if self._standing.config.clip_norm is None:
            self._send_waiting()
        return future

    def end(self) -> None:
        """Ends a backward pass, after its last bucket.

        Raises:
            RuntimeError, PayloadError: the pass has been discarded; or as Pass.close().
        """
        if self._pass.stage is not Stage.OPEN:
            raise RuntimeError(advice.discarded())
        self._take_from_node()
        self._send_waiting()
        if self._pass.inside:
            self.exchange.finish()
        gather(self._pass.inside, self._standing.layouts.of, self._pass.context.loss_scale)
        self._pass.close(self.exchange, self._late)
        self._standing.step += 1
        self._standing.layouts.keep(self._pass.buckets)
        self._total_bytes += bytes_sent(self._pass.buckets, self.exchange.topology)
        if self.memory.ages is not None:
            self.memory.ages.end(self._standing.step)
        self._count(self._stats.skipped)

    def _take_from_node(self) -> None:
        """Waits for the mean of the bucket that was scattered last, which can then be sent."""
        one, self._pass.scattered = self._pass.scattered, None
        if one is not None and one.mean is not None:
            with record_function("dgc.node"):
                one.mean()
            self._pass.waiting.append((one.node.inner, one.inner))
            self._pass.inside.append(one._replace(mean=None))

    def _send_waiting(self) -> None:
        waiting, self._pass.waiting = self._pass.waiting, []
        scale = self._scale([gradients for gradients, _ in waiting])
        for gradients, future in waiting:
            self._send(gradients, scale, future)

    def _scale(self, waiting: list[Gradients]) -> Tensor | None:
        """Returns the factor for this rank's gradients, float32 [1]; None for 1."""
        standing, topology = self._standing, self.exchange.topology
        # A sum is one over the ranks, also where the node's gradients have been averaged here.
        most = 1.0 if self._average else float(topology.averaged * (topology.places if standing.divided else 1))
        unscale = self._pass.context.unscale
        if standing.config.clip_norm is None:
            if most != 1:
                scale = torch.full((1,), most, dtype=torch.float32, device=standing.parameters.device)
                return scale if unscale is None else scale * unscale
            return unscale
        with record_function("dgc.clip"):
            norms = {
                slot.name: squared_norm(gradients.of(i))
                for gradients in waiting
                for i, slot in enumerate(gradients.slots)
            }
            ordered = torch.stack([norms[name] for name in standing.parameters.by_name if name in norms])
            self.exchange.sum_in_node(ordered)
            return clip_scale(ordered, standing.config.clip_norm, topology.workers, most, unscale)

    def _send(self, gradients: Gradients, scale: Tensor | None, future: Future[Tensor]) -> None:
        bucket, context = self._standing.layouts.of(gradients), self._pass.context
        self._pass.buckets.append(bucket)
        transfer = bucket.send(gradients, context, scale)
        self._pass.sent.append(future)
        # It runs in the backend's thread or in exchange.finish(), so it must do local work only, and never wait.
        # Where ranks hold the model together, all of them have to raise what one finds: the verdict says it.
        late = self._late or self.exchange.topology.places > 1
        arrival = _Arrival(bucket, gradients, context, transfer, future, late)
        transfer.done.add_done_callback(partial(_receive, [arrival]))

    def _look_for_a_lost_residual(self) -> None:
        parameters = self._standing.parameters
        told = "residual" in self._told or parameters.came_dense  # a dense run's steps had no residual
        if self._standing.step == 0 and not told and (steps := parameters.rule.steps_taken):
            self._tell("residual", advice.residual_missing(steps))
        self._told.add("residual")


class _Arrival(NamedTuple):
    """The arguments of _receive: one bucket whose exchange is complete."""

    bucket: Bucket
    gradients: Gradients
    context: PassContext
    transfer: Transfer
    future: Future[Tensor]
    late: bool


def _receive(arrivals: list[_Arrival], _: object) -> None:
    """Writes the averages into the gradients and completes the future, with the result or with the error.

    The backend's thread drops all references that lead to the process group before it completes the future. If the run
    ended then, this thread would otherwise be the last owner of the group. gloo's process group ends the process if a
    thread of its own frees it.

    Args:
        arrivals: a list of one arrival, which is taken out of it.
    """
    bucket, gradients, context, transfer, future, late = arrivals.pop()
    buffer = gradients.buffers[0]
    try:
        with transfer.arrived(), record_function("dgc.unpack"):
            bucket.receive(gradients, context, late)
            del bucket, gradients, context
            future.set_result(buffer)
    except Exception as error:
        # Left to itself, an exception in a callback would leave backward() waiting past every timeout.
        future.set_exception(error)  # type: ignore[arg-type]  # torch's annotation is wrong
