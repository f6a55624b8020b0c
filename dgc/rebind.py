"""rebind: a model that has got, lost or exchanged parameters in the middle of a run."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from . import ddp, fsdp
from .door import check_weights
from .doors import Registered
from .exchange.base import Exchange
from .memory.moved import norm_of, place
from .memory.names import by_name
from .memory.parameters import Parameters
from .memory.refusals import unwrapped
from .step.lifecycle import Pass
from .step.standing import Standing

logger = logging.getLogger("dgc")

Left = dict[str, dict[str, Tensor]]
"""What has found no place in the new model: tensors by name, and by kind ("residual", "momentum" and so on)."""


class Rebound(Registered):
    """A registered state that can be told of another model."""

    def rebind(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        optimizer: Optimizer | None = None,
        *,
        back: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Left:
        """Goes on with a changed model; a collective, between step() and the next backward().

        What has been accumulated is taken over by name and shape, and so is the optimizer's state; new parameters start
        at zero. Step, density and total figures go on; masks are taken off. A DDP module has to be a new one: delete
        the old one, and wrap the model again.

        Args:
            model: the changed model: a new DDP module, one sharded by fully_shard, or a plain one, on which the state
                is then registered as it was before; or named parameters, to register it afterwards.
            optimizer: of all its trainable parameters, dgc's; None for the present one. In the present one a parameter
                that was replaced gives its place to the new one of its name. With Horovod, one that
                dgc.horovod.DistributedOptimizer has wrapped anew, as it wrapped the present one.
            back: what an earlier rebind() has returned, for parameters that have come back.

        Returns:
            What has found no place: of parameters that are frozen, removed, or of another shape now. It is in no model;
            keep it for `back`, or drop it.

        Raises:
            ValueError: as DGCState: two parameters of one name, or a parameter that the optimizer does not hold; ranks
                have other models; an old DDP module is still there; with Horovod, an optimizer that is not wrapped, or
                wrapped otherwise; or `back` is of another shape. Nothing has changed then.
            RuntimeError: an update is outstanding.
        """
        self.settle_between_steps("rebind")
        if self.exchange.changed:
            self.regroup()
        old = self._standing
        exchange = old.own_exchange
        into = old.parameters.optimizer if optimizer is None else unwrapped(optimizer)
        before = [list(group["params"]) for group in into.param_groups], dict(into.state)
        try:
            parameters, error = self._new_parameters(model, into, back or {}), None
        except (TypeError, ValueError) as caught:
            parameters, error = None, caught
        try:
            errors = exchange.everyone(str(error or ""))
            if parameters is None:
                assert error is not None
                raise error
            if other := next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), None):
                raise ValueError(f"rebind: expected all ranks to go on, but {other}. Nothing has changed")
            standing = Standing(
                old.made_with, parameters, self._exchange_of(parameters), old.codec, self.grad_scaler is not None
            )
            if fsdp.is_sharded(model):
                check_weights(parameters.by_name, exchange)
        except Exception:
            for group, params in zip(into.param_groups, before[0], strict=True):
                group["params"][:] = params
            into.state.clear()
            into.state.update(before[1])
            raise
        left = standing.take_over(old)
        for name, held in (back or {}).items():
            place(standing.memory, name, held)
        self._go_on_with(standing, into)
        if left and exchange.rank == 0:
            logger.info(
                "dgc: rebind: %s left behind, of norm %.4g on rank 0; the caller has it, for rebind(back=)",
                ", ".join(left),
                norm_of(left),
            )
        self._register_again(model)
        return left

    def _new_parameters(
        self, model: nn.Module | Iterable[tuple[str, Tensor]], into: Optimizer, back: Mapping[str, Mapping[str, Tensor]]
    ) -> Parameters:
        """Returns the parameters of the changed model, whose state the optimizer has then; local."""
        old = self._standing
        new = by_name(model.named_parameters() if isinstance(model, nn.Module) else model)
        gc.collect()
        if isinstance(model, DistributedDataParallel) and any(m is not model for m in ddp.registered_on(self)):
            raise ValueError(
                "rebind: expected the old DistributedDataParallel module to be gone, got one that is still there, and "
                "would reduce gradients too: del it, or set its name to None, before the model is wrapped again"
            )
        if isinstance(model, nn.Module) and fsdp.is_sharded(model):
            fsdp.check_module(model, new)
        _follow(old.parameters, new, into)
        topology = self.exchange.topology
        places = (topology.place, topology.places) if old.divided else (0, 1)
        parameters = Parameters(new.items(), into, old.made_with, self.grad_scaler is not None, *places)
        for name, held in back.items():
            shape = parameters.slots[name].shape if name in parameters.slots else "no such parameter"
            if wrong := [tuple(t.shape) for t in held.values() if tuple(t.shape) != shape]:
                raise ValueError(f"back: expected tensors of the new model's {name}, {shape}, got {wrong[0]}")
        return parameters

    def _exchange_of(self, parameters: Parameters) -> Exchange:
        """Returns the collectives of a changed model."""
        return self._standing.own_exchange

    def _go_on_with(self, standing: Standing, into: Optimizer) -> None:
        """Makes the state that of the new parameters."""
        before = self._standing.parameters
        before.rule.release(self)
        standing.parameters.rule.attach(self)
        if into is not before.optimizer:
            into.register_state_dict_post_hook(partial(note_saved, weakref.ref(self)))
        self._standing, self._pass, self._error = standing, Pass.none(standing.step), None
        self._places, self._wrapped_later = None, False

    def _register_again(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Registers the state on a module as it was registered before."""
        door, plain = self._door, self._plain is not None
        if door is not None:
            door.close()
        self._door, self._plain, self._model = None, None, None
        if isinstance(model, nn.Module):
            if plain and not isinstance(model, DistributedDataParallel):
                self.register_plain(model)
            else:
                self.register(model, in_step=door is not None and door.in_step)


def _follow(old: Parameters, new: Mapping[str, Tensor], into: Optimizer) -> None:
    """Gives each new parameter the optimizer's state of the old one of its name and shape, and its place in a group."""
    if type(into) is not type(old.optimizer):
        return
    held = {id(p) for group in into.param_groups for p in group["params"]}
    for name, p in new.items():
        before = old.by_name.get(name)
        if before is None or before.shape != p.shape:
            continue
        if before is not p and id(p) not in held:
            for group in into.param_groups:
                group["params"][:] = [p if q is before else q for q in group["params"]]
        if not into.state.get(p) and (state := old.optimizer.state.get(before)):
            into.state[p] = dict(state)
        if before is not p:
            into.state.pop(before, None)


def note_saved(state: weakref.ref[Rebound], optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Tells a state that its optimizer's state_dict() was called."""
    if (alive := state()) is not None:
        alive.note_saved_optimizer()
