"""Doors: how gradients come to a DGCState, from a DDP module, from one sharded by FSDP2, or in step()."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import ddp, fsdp, left
from .door import Door, check_weights
from .exchange.distributed import DistributedExchange
from .optim.convert import convert_back
from .step import advice, log
from .step.changing import Changing

logger = logging.getLogger("dgc")


class Registered(Changing):
    """A reducer of gradients that is registered on a model, which then passes them on."""

    _model: weakref.ref[DistributedDataParallel] | None = None
    _plain: weakref.ref[nn.Module] | None = None
    _door: Door | None = None
    _places: list[tuple[Mapping[str, Any], str, object]] | None = None  # where the model holds its parts
    _wrapped_later = False  # whether it was looked whether DDP has wrapped a plain module since
    follower: ddp.Reducer | None = None
    """The state that was attached to the same DDP module after this one was detached."""

    def register(self, model: nn.Module, *, in_step: bool = False) -> None:
        """Registers this state on a model, whose gradients it then reduces; a collective of the process group.

        For DDP, call it in place of `model.register_comm_hook(state, dgc.dgc_hook)`, which tells the state neither
        DDP's group nor its parameters. Without register(), the first backward pass looks them up.

        Args:
            model: a DistributedDataParallel module, or one that fully_shard (FSDP2) has sharded inside the node, with
                the parameters that the state was made of; once torch.distributed has been initialised again, the new
                module.
            in_step: exchanges in the optimizer's step(), what .grad then holds: for loops of several backward passes
                before a step, and for wrappers that leave gradients unsynchronised, as a pipeline. DDP is told to leave
                them. Nothing overlaps with the backward pass, and each step() begins with a further small exchange.

        Raises:
            TypeError: it is neither a DDP module, nor sharded by fully_shard.
            ValueError: it has other parameters, another hook, or another group than process_group; or ranks differ, in
                weights too where it is no DDP module.
            RuntimeError: a state_dict was loaded for other ranks than those of DDP's group; or an update is
                outstanding.
        """
        if in_step and isinstance(model, DistributedDataParallel):
            left.register(self, self.bind(model))
        if in_step or fsdp.is_sharded(model):
            self._open(model, in_step)
            check_weights(self._standing.parameters.by_name, self.exchange)
            return
        module = self.bind(model)
        if self.exchange.changed:
            self.regroup()
        ddp.register(self, module)

    def register_plain(self, model: nn.Module, *, in_step: bool = False) -> None:
        """Takes gradients from .grad of a model without DDP, and copies rank 0's weights to all; a collective.

        Args:
            model: a plain module.
            in_step: as in register().

        Raises:
            TypeError: a part of it is FSDP1's.
            ValueError: a part of it is in DDP, which exchanges its gradients; or ranks differ.
        """
        fsdp.check_plain(model)
        if ddp.holding(self._standing.parameters.by_name) is not None:
            raise ValueError(advice.wrapped("DistributedDataParallel has wrapped it"))
        opened = self._open(model, in_step)
        opened.broadcast(model, self.exchange)
        self._plain = weakref.ref(model)
        if self.exchange.rank == 0:
            ranks = self.exchange.world_size
            logger.info("dgc: exchanging gradients of a plain module without DDP over %d ranks", ranks)

    def exchange_in_step(self) -> None:
        """Exchanges in step() what .grad of its parameters then holds, whatever made it; a collective."""
        self._open(nn.Module(), in_step=True)
        check_weights(self._standing.parameters.by_name, self.exchange)

    def _open(self, model: nn.Module, in_step: bool = False) -> Door:
        parameters = self._standing.parameters.by_name
        if fsdp.is_sharded(model):
            fsdp.check_module(model, parameters)
        if self.exchange.changed:
            self.regroup()
        self._door = Door(self, parameters, in_step)
        return self._door

    def detach(self) -> dict[str, Any]:
        """Ends compression, and returns what waits on this rank; a collective, between step() and the next backward().

        The optimizer becomes torch's of the same name, with the mean of all ranks' momentum or moments. DDP cannot
        remove a hook; ours averages densely from now on, as DDP would. Without DDP, nobody exchanges gradients any
        more. A later dgc.attach() begins anew, and takes what waits by `optimizer.dgc.load_state_dict()`.

        Returns:
            The state_dict() of this rank, as copies. The residual in it is in no parameter.

        Raises:
            RuntimeError: an update is outstanding, or the ranks of a node hold memory together; or it was detached.
        """
        exchange, standing = self.exchange, self._standing
        if exchange.topology.places > 1 or not isinstance(exchange, DistributedExchange):
            raise RuntimeError(
                "DGCState.detach: expected ranks of torch.distributed that each hold the whole model, got "
                f"{type(exchange).__name__}: save by state.state_dict() or dgc.checkpoint.save(state, dir), and build "
                "model and optimizer anew"
            )
        self.settle_between_steps("detach")
        standing.take_what_is_added()
        waiting = copy.deepcopy(self.state_dict())
        norm, parameters = float(torch.linalg.vector_norm(standing.memory.residual)), standing.parameters
        means = {kind: {parameters.by_name[n]: t for n, t in of.items()} for kind, of in standing.means().items()}
        parameters.rule.release(self)
        name, where = type(parameters.optimizer).__name__, "DDP averages gradients densely"
        back = convert_back(parameters.optimizer, means)
        if self._door is not None:
            self._door.close()
            where = "nobody exchanges gradients: wrap the model in DistributedDataParallel"
        standing.release()
        self._detached, self._door, self._plain = True, None, None
        if exchange.rank == 0:
            logger.info(
                "dgc: detached after step %d: %s%s. What waits on rank 0, of norm %.3g, is in no parameter, but in "
                "what detach() returned, for load_state_dict() of a later DGCState",
                standing.step,
                f"torch.optim.{name} again, with the mean of the ranks' momentum; " if back else "",
                where,
                norm,
            )
        return waiting

    def no_sync(self) -> AbstractContextManager[None]:
        """Returns a context whose backward passes add up gradients without an exchange, for a model without DDP.

        For an FSDP2 model that reduces in every backward pass. With set_requires_gradient_sync(False) FSDP2 adds up
        gradients itself, and this is not needed.

        Raises:
            RuntimeError: the model is a DDP module, which has a no_sync() of its own, or none is registered.
        """
        if self._door is None:
            raise RuntimeError(
                "DGCState.no_sync: expected a model sharded by fully_shard that is registered, got none. For DDP, use "
                "its own: with model.no_sync()"
            )
        return self._door.shut()

    def send(self) -> None:
        """Starts the exchange of the gradients in .grad, which step() then waits for; a collective.

        Raises:
            RuntimeError: step() is not to exchange.
        """
        if self._door is None:
            raise RuntimeError("DGCState.send: expected a state registered with in_step=True, got another")
        self._door.send(self.exchange)

    def collect(self) -> None:
        """Exchanges the gradients in .grad, where step() is to do it; a collective then.

        Raises:
            RuntimeError: the model has other parameters now.
            ValueError: DDP has wrapped a plain module, and so exchanges its gradients too.
        """
        self._look_at_the_model()
        if self._door is not None:
            self._door.collect(self.exchange)

    def _look_at_the_model(self) -> None:
        model: nn.Module | None = self._plain() if self._plain is not None else self.model
        if model is None:
            return
        known = self._standing.parameters.by_name
        if self._plain is not None and not self._wrapped_later:
            self._wrapped_later = True
            if ddp.holding(known) is not None:
                raise ValueError(advice.wrapped("DistributedDataParallel has wrapped it since"))
        # A tenth of what model.parameters() takes, which has to be asked only where something has moved.
        if self._places is None or any(held.get(key) is not value for held, key, value in self._places):
            present = {id(p): name for name, p in model.named_parameters()}
            if replaced := [name for name, p in known.items() if id(p) not in present]:
                raise RuntimeError(advice.replaced(replaced))
            if self.exchange.rank == 0:
                log.log_masked_since({name: present[id(p)] for name, p in known.items()})
            self._places = _places(model)

    def bind(self, model: nn.Module) -> DistributedDataParallel:
        """Checks a DDP module, takes its process group, and returns the module.

        Raises:
            TypeError, ValueError, RuntimeError: as register().
        """
        module = ddp.check_module(self, model, self._standing.parameters.by_name)
        if self._standing.loaded_for_others_than(ddp.ranks_of(module)):
            raise RuntimeError(advice.loaded_too_early())
        if isinstance(self._standing.own_exchange, DistributedExchange):
            self._standing.own_exchange.bind(module.process_group)
        self._model = weakref.ref(module)
        return module

    @property
    def model(self) -> DistributedDataParallel | None:
        """The DDP module whose gradients this reduces; None where it is unknown or gone."""
        return None if self._model is None else self._model()

    @property
    def detached(self) -> bool:
        """Whether detach() was called."""
        return self._detached

    @property
    def registered(self) -> bool:
        """Whether this state is registered on a model."""
        if self._detached:
            return False
        return self._door is not None or self.model is not None or bool(ddp.registered_on(self))


def _places(model: nn.Module) -> list[tuple[Mapping[str, Any], str, object]]:
    """Returns where a model holds each of its modules and parameters: the dict, the key and the object."""
    held = [part for module in model.modules() for part in (module._modules, module._parameters)]
    return [(part, key, value) for part in held for key, value in part.items()]
