"""Doors: how gradients come to a DGCState, from a DDP module, from one sharded by FSDP2, or in step()."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import ddp, fsdp
from .door import Door
from .exchange.distributed import DistributedExchange
from .step import advice
from .step.saving import Saved


class Registered(Saved):
    """A reducer of gradients that is registered on a model, which then passes them on."""

    _model: weakref.ref[DistributedDataParallel] | None = None
    _door: Door | None = None

    def register(self, model: nn.Module, *, in_step: bool = False) -> None:
        """Registers this state on a model, whose gradients it then reduces; a collective of the process group.

        For DDP, call it in place of `model.register_comm_hook(state, dgc.dgc_hook)`, which tells the state neither
        DDP's group nor its parameters. Without register(), the first backward pass looks them up.

        Args:
            model: a DistributedDataParallel module, or one that fully_shard (FSDP2) has sharded inside the node, with
                the parameters that the state was made of; once torch.distributed has been initialised again, the new
                module.
            in_step: exchanges in the optimizer's step(), what .grad then holds, for any wrapper that leaves gradients
                unsynchronised there: DDP under no_sync(), a pipeline, a sharding of its own. Nothing overlaps with the
                backward pass then, and each step() begins with a further small exchange.

        Raises:
            TypeError: it is neither a DDP module, nor sharded by fully_shard.
            ValueError: it has other parameters, another hook, or another group than process_group; or ranks differ, in
                weights too where it is no DDP module.
            RuntimeError: a state_dict was loaded for other ranks than those of DDP's group; or an update is
                outstanding.
        """
        if in_step or fsdp.is_sharded(model):
            self.open_door(model, in_step=in_step)
            return
        module = self.bind(model)
        if self.exchange.changed:
            self.regroup()
        ddp.register(self, module)

    def open_door(self, model: nn.Module, *, in_step: bool = False, broadcast: bool = False) -> None:
        """Takes gradients from .grad of the parameters, of a model without DDP; a collective.

        Args:
            model: with the parameters that the state was made of.
            in_step: whether step() exchanges, and not the backward pass.
            broadcast: copies parameters and buffers from rank 0; else their equality is checked.

        Raises:
            ValueError: as register().
        """
        parameters = self._standing.parameters.by_name
        if fsdp.is_sharded(model):
            fsdp.check_module(model, parameters)
        if self.exchange.changed:
            self.regroup()
        opened = Door(self, parameters, in_step)
        if broadcast:
            opened.broadcast(model, self.exchange)
        else:
            opened.check_weights(self.exchange)
        self._door = opened

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
        """Exchanges the gradients in .grad, where step() is to do it; a collective then."""
        if self._door is not None:
            self._door.collect(self.exchange)

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
    def registered(self) -> bool:
        """Whether this state is registered on a model."""
        return self._door is not None or self.model is not None or bool(ddp.registered_on(self))
