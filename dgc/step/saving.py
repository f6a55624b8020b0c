"""Saving: momentum and residual into a state_dict and back, on the same number of ranks or another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dgc.exchange.distributed import DistributedExchange
from dgc.exchange.islands import IslandExchange
from dgc.memory import group
from dgc.memory.share import Choice, Share, unwrap, wrap

from . import advice
from .lifecycle import Pass
from .reducer import Reducer


class Saved(Reducer):
    """A Reducer that can be saved between steps, and loaded."""

    _saved = False  # whether any state_dict of this state was asked for
    _optimizer_saved = False  # whether the optimizer's was, while there was something to lose

    def note_saved_optimizer(self) -> None:
        """Notes that the optimizer's state_dict() was called; the next pass says so if this state was not saved."""
        self._optimizer_saved |= self.step > 0

    def begin(self, shadow: bool = False) -> None:
        """Begins a backward pass; see Reducer.begin."""
        if self._optimizer_saved and not self._saved:
            self._tell("unsaved", advice.unsaved())
        super().begin(shadow)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's momentum and residual by parameter name, and its step; each rank saves its own.

        Tensors are views, not copies. torch.load(weights_only=True) reads it back. torch.distributed.checkpoint keeps
        the ranks' state_dicts apart, and loads them on the same number of ranks.

        Raises:
            RuntimeError: between backward() and step(): what was sent would be in neither the residual nor the model.
            FloatingPointError, PayloadError: on a GPU, what the next step() would have raised.
        """
        return wrap({self.exchange.topology.share: self._own()})

    def full_state_dict(self) -> dict[str, Any]:
        """Returns on rank 0 a state_dict that loads on any number of ranks, and {} elsewhere; a collective.

        For frameworks where rank 0 writes one file. Tensors are copies on the CPU, 8 bytes a parameter and rank, or a
        parameter and node where nodes are the workers.

        Raises:
            RuntimeError, FloatingPointError, PayloadError: as state_dict(); RuntimeError also for a model that FSDP2
                shards, and for nodes under Horovod.
        """
        if isinstance(self.exchange, IslandExchange) and self._standing.divided:
            return group.gather_parts(self.exchange, self.memory, self._own())
        if self.exchange.topology.places > 1:
            raise RuntimeError(
                "DGCState.full_state_dict: expected ranks that hold the whole model, got shards of it, which together "
                "need not fit on one rank: use dgc.checkpoint.save(state, dir), or under Horovod state_dict() on each "
                "rank. Both load on any number of ranks"
            )
        if self.exchange.changed:
            self.regroup()
        return group.gather(self.exchange, self.memory, self._own())

    def _own(self) -> dict[str, Any]:
        self.settle_between_steps("state_dict")
        self._saved = True
        return self._standing.own()

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, allow_missing_ranks: bool = False
    ) -> None:
        """Continues from a saved state_dict(); changes nothing unless all of it fits.

        Args:
            state_dict: this rank's; or that of all ranks, from full_state_dict() or as a list, for any number of ranks.
                From all ranks' this rank takes over its part, so that the mean over the ranks stays the same
                (docs/reliability.md).
            allow_missing_ranks: whether the shares of missing ranks count as zero, which is logged; else they are an
                error.

        Raises:
            ValueError: it is of another model, version or rank, ranks are missing, or values are damaged; the message
                lists what differs.
        """
        state_dicts = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict or ())
        parts = [share for one in state_dicts for share in unwrap(one)]
        self.take_up(self.choose(parts, allow_missing_ranks))

    def choose(self, parts: Sequence[Mapping[str, Any]], allow_missing_ranks: bool = False) -> Choice:
        """Returns this rank's part of the shares that ranks have saved; changes nothing.

        Raises:
            ValueError: as load_state_dict().
        """
        return self._standing.choose(parts, allow_missing_ranks)

    def take_up(self, choice: Choice) -> None:
        """Continues a run from the state_dicts chosen for this rank; an outstanding pass is abandoned."""
        self._pass.abandon(self.exchange)
        self._standing.take_up(choice)
        self._told.add("residual")
        self._pass = Pass.none(self.step)
        self._error = None
        self._stats = replace(self._stats, steps=self.step)

    def restore(self, state_dict: Mapping[str, Any], joined: bool) -> None:
        """Restores this rank's state_dict() and the group of that time; for a handler that commits.

        Args:
            state_dict: this rank's own.
            joined: the value of `joined` at that time.
        """
        (share,) = map(Share.of, unwrap(state_dict))
        self._standing.own_exchange.roll_back(share.rank, share.world_size)
        self.load_state_dict(state_dict)
        self._standing.joined = joined

    def pickled(self) -> dict[str, Any]:
        """Returns the parts of a state that are pickled, between steps; see DGCState.__getstate__.

        Raises:
            TypeError: the ranks do not talk over torch.distributed; or they hold shards of the model.
        """
        share = self._own()
        for kind in ("residual", *self.memory.kinds):
            share[kind] = {name: tensor.clone() for name, tensor in share[kind].items()}
        standing = self._standing
        if not isinstance(standing.own_exchange, DistributedExchange):
            raise TypeError(
                "DGCState: expected ranks that talk over torch.distributed to pickle it, got "
                f"{type(standing.own_exchange).__name__}. Use state_dict()"
            )
        if self.exchange.topology.places > 1:
            raise TypeError(
                "DGCState: expected ranks that hold the whole model to pickle it, got shards of one, whose process "
                "groups cannot be pickled: use dgc.checkpoint.save(state, dir)"
            )
        arguments = {
            "config": standing.made_with,
            "grad_scaler": self.grad_scaler,
            "average": self._average,
            "codec": standing.codec,
            "late": self._late if self._late != (standing.parameters.device.type == "cuda") else None,
        }
        named, optimizer = standing.parameters.by_name, standing.parameters.optimizer
        return {"named": named, "optimizer": optimizer, "arguments": arguments, "share": share}

    def unpickle(self, saved: dict[str, Any]) -> None:
        """Continues from the share in pickled()."""
        share = Share.of(saved)
        self.take_up(Choice(share, [(1.0, saved)], []))
        self._standing.own_exchange.roll_back(share.rank, share.world_size)
