"""Changing: a model whose weights die, are born, and want a dense step now and then."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.futures import Future

from dgc.local import gradient_of
from dgc.memory.slots import Gradients

from . import advice
from .log import logger
from .masks import Forgotten, agree, checked, forget
from .saving import Saved


class Changing(Saved):
    """A Reducer whose user forgets what has been accumulated for some weights, and masks them."""

    _dense_once = False

    def forget(self, parameter: Tensor | str, keep: Tensor | None = None) -> Forgotten:
        """Drops what this rank has accumulated for some entries of a parameter, between step() and the next backward().

        Residual, momentum, dgc.AdamW's first moment and dgc.SGD's momentum of weight decay become zero there. The
        second moment of dgc.AdamW, which only divides, stays. What is dropped is in no model: it is logged, and counted
        in `stats.forgotten`. Call it on all ranks with one mask; each drops its own.

        Args:
            parameter: it or its name.
            keep: bool, of the whole parameter's shape: True where nothing is dropped. None to keep nothing.

        Returns:
            The number of entries and the norms of what was dropped on this rank.

        Raises:
            ValueError: the parameter is unknown, or keep has another shape.
            RuntimeError: an update is outstanding.
        """
        name, p = self._named(parameter)
        alive = None if keep is None else checked(name, keep, p.shape)
        self.settle_between_steps("forget")
        return self._forget(name, p, alive)

    def _forget(self, name: str, p: Tensor, alive: Tensor | None) -> Forgotten:
        standing = self._standing
        dropped = forget(standing.memory, standing.parameters.rule, p, self.slot(p), self._dead(p, alive))
        self._forgotten += dropped.entries
        self._stats = replace(self._stats, forgotten=self._forgotten)
        logger.info("%s, on rank %d", dropped, self.exchange.rank)
        return dropped

    def _dead(self, p: Tensor, alive: Tensor | None) -> Tensor:
        """Returns the dead entries of this rank's part of a parameter: all, without a mask of the living."""
        slot = self.slot(p)
        if alive is None:
            return torch.ones(slot.shape, dtype=torch.bool, device=self.memory.device)
        return ~slot.part(alive).to(self.memory.device)

    def mask(self, parameter: Tensor | str, mask: Tensor | None) -> Forgotten | None:
        """Masks a parameter from the next step on, or takes its mask off; a collective, between step() and backward().

        Dead entries are forgotten, as by forget(). Their gradients count as zero, so that they are never sent, and k is
        a share of those alive. In a dense step .grad has all entries until step(), which applies those alive: what
        grows weights by gradients reads them between. The weights themselves are the user's to set to zero. Masks are
        in no checkpoint: set them again after loading.

        Args:
            parameter: it or its name.
            mask: bool, of the whole parameter's shape, True for entries that are alive; the same on all ranks. None for
                no mask.

        Returns:
            What was dropped on this rank; None without a mask.

        Raises:
            ValueError: the parameter is unknown, the mask has another shape, or ranks differ: the message has the first
                place. Nothing has changed then.
            RuntimeError: an update is outstanding, or the ranks of a node divide memory.
        """
        name, p = self._named(parameter)
        alive = None if mask is None else checked(name, mask, p.shape)
        standing = self._standing
        if standing.divided:
            raise RuntimeError(advice.no_masks())
        self.settle_between_steps("mask")
        if self.exchange.changed:
            self.regroup()
        agree(self.exchange, name, alive)
        standing.layouts.leave()
        standing.layouts.alive.pop(name, None)
        if alive is None:
            standing.masks.set(name, None)
            return None
        dead = self._dead(p, alive)
        standing.masks.set(name, dead)
        standing.layouts.alive[name] = dead.numel() - int(dead.sum())
        return self._forget(name, p, alive)

    def dense_step(self) -> None:
        """Makes the next step dense, on all ranks alike; what waits stays, and goes on waiting.

        Raises:
            RuntimeError: an update is outstanding, or the ranks of a node divide memory.
        """
        self.settle_between_steps("dense_step")
        if self._standing.divided:
            raise RuntimeError(advice.no_dense())
        self._dense_once = True

    def _named(self, parameter: Tensor | str) -> tuple[str, Tensor]:
        known = self._standing.parameters.by_name
        name = parameter if isinstance(parameter, str) else self.slot(parameter).name
        if name not in known:
            raise ValueError(f"DGCState: expected one of the parameters {advice.names([*known])}, got {name!r}")
        return name, known[name]

    # The backward pass.

    def begin(self, shadow: bool = False) -> None:
        """Begins a backward pass; see Reducer.begin."""
        if not self._dense_once:
            return super().begin(shadow)
        before, self._standing.dense = self._standing.dense, True
        try:
            super().begin(shadow)
            self._dense_once = False
        finally:
            self._standing.dense = before

    def reduce(self, gradients: Gradients) -> Future[Tensor]:
        """Reduces one bucket of gradients in place; see Reducer.reduce."""
        if masks := self._standing.masks:
            masks.silence(gradients, self._standing.layouts.phase.dense)
        return super().reduce(gradients)

    def take(self) -> bool:
        """Claims the reduced gradients for step(), those of dead weights left out; see Claims.take."""
        taken = super().take()
        for name, dead in self._standing.masks.dead.items():
            gradient = gradient_of(self._standing.parameters.by_name[name])
            if gradient is not None and name in self._standing.layouts.phase.dense:
                self.slot(self._standing.parameters.by_name[name]).part(gradient).masked_fill_(dead, 0)
        return taken
