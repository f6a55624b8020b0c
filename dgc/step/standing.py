"""Standing: the state of a run, that is its step, its memory and its group of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from dgc.config import DGCConfig
from dgc.exchange.base import Exchange, Islands
from dgc.exchange.distributed import DistributedExchange
from dgc.memory import group
from dgc.memory import share as shares
from dgc.memory.memory import MOMENTUM, Memory
from dgc.memory.moved import move
from dgc.memory.parameters import Parameters
from dgc.memory.pieces import pieces_of
from dgc.memory.share import Share
from dgc.ops.codec import Codec
from dgc.stats import Choice

from . import advice, log
from .agree import description
from .allotment import NOT_IN_NODES
from .auto import Auto
from .layouts import Layouts
from .masks import Masks


class Standing:
    """The step, the density and the dense switch; memory; and the group of ranks that has agreed on all of them.

    Attributes:
        made_with: the user's configuration, which ranks compare.
        config: the one in force, with the density of set_density().
        step: backward passes reduced so far, without skipped ones: the position in the warm-up.
        dense: whether DGC is switched off.
        joined: whether memory is this rank's share of a group's.
        dropped: fingerprint of the parameters whose gradients were thrown away before the last step(); 0 for none.
        masks: the weights that are dead.
        divided: whether the ranks of a node divide the memory of parameters that all of them have.
        auto: chooses between dense and compressed steps; None where bytes alone decide (DGCConfig.exchange).
    """

    def __init__(
        self, config: DGCConfig, parameters: Parameters, exchange: Exchange, codec: Codec, loss_scaling: bool
    ) -> None:
        """Allocates memory, and agrees with the other ranks where they are known already."""
        self.made_with = self.config = config
        self.parameters = parameters
        self.own_exchange = exchange
        rounded = config.dense_wire_dtype != torch.float32
        self.memory = Memory(parameters.slots, parameters.compressed, parameters.device, rounded=rounded)
        self.memory.allocate(parameters.rule.kept)
        inside = exchange if isinstance(exchange, Islands) and parameters.mesh is None else None
        self.divided = inside is not None
        if self.divided and rounded:
            raise ValueError(advice.dense_in_16_bits(config.dense_wire_dtype))
        if self.divided and config.selection == "global":
            raise ValueError(NOT_IN_NODES)
        if self.divided and config.exchange == "auto":
            raise ValueError(advice.no_auto())
        self.auto = Auto() if config.exchange == "auto" else None
        self.layouts = Layouts(config, parameters, self.memory, exchange, codec, inside)
        self.masks = Masks()
        self.step, self.dense, self.joined = 0, False, False
        self.dropped = 0
        self.codec, self._loss_scaling = codec, loss_scaling
        self._density: float | None = None  # set by set_density()
        self._loaded_for: list[int] | None = None  # the ranks that shares were chosen for, before DDP's were known
        if not exchange.changed:
            self.regroup()

    @property
    def exchange(self) -> Exchange:
        """The collectives. Until ranks have agreed, each access updates rank and world_size."""
        exchange = self.own_exchange
        if not self.joined and exchange.changed:
            exchange.refresh()
            exchange.roll_back(exchange.rank, exchange.world_size)  # the ranks still have to agree
        return exchange

    def loaded_for_others_than(self, ranks: list[int]) -> bool:
        """Returns whether the loaded shares were divided among other ranks than these."""
        return self.joined and self._loaded_for is not None and self._loaded_for != ranks

    def refresh(self) -> None:
        """Looks again at the optimizer's groups and at the parameters' memory format, which users change in a run."""
        self.parameters.refresh()
        if slots := self.parameters.lay_out_again():
            self.memory.lay_out_again(slots)
            self.layouts.leave()

    def enter(self) -> None:
        """Enters the phase of the next pass, and logs it where it is new.

        With DGCConfig.exchange "auto" it is a collective at the end of each round of a trial; see Auto.
        """
        whole = (
            "state.dense is set" if self.dense else 'exchange="auto" takes dense steps' if self._auto_is_dense() else ""
        )
        new = self.layouts.enter(self.step, whole)
        on_trial = self.auto is not None and self.auto.on_trial(self.step)
        if new and not on_trial and self.exchange.rank == 0:
            layouts = self.layouts
            log.log_phase(layouts.phase, self.parameters.slots, layouts.schedule, self.step, off=bool(whole))

    def _auto_is_dense(self) -> bool:
        if self.auto is None:
            return False
        schedule, rows = self.layouts.schedule, self.exchange.topology.rows
        density = schedule.density(self.step)
        if self.dense or rows == 1 or not self.layouts.compresses(density):
            self.auto.leave()
            return False
        return self.auto.enter(self.step, density, rows, schedule.steps_left(self.step), self.exchange)

    @property
    def choice(self) -> Choice | None:
        """The choice of the present phase; None where bytes alone decide, or before the first trial is over."""
        return None if self.auto is None else self.auto.choice

    def take_what_was_brought(self) -> None:
        """Moves the tensors of a dense run, equal on all ranks, from the optimizer into memory."""
        for name, kinds in self.parameters.brought():
            for kind, value in kinds.items():
                self.memory.set(kind, name, value)

    def regroup(self) -> None:
        """Agrees with all present ranks, and takes memory over into their group; see DGCState.regroup."""
        exchange = self.own_exchange
        # A single rank without steps and memory, as after set_density() without a process group, joins as if new.
        nothing = self.step == 0 and exchange.topology.shares == 1 and self.memory.empty
        mine = self.share() if self.joined and not nothing else None
        before = exchange.rank, exchange.world_size
        exchange.refresh()
        try:
            places = exchange.topology.places
            exchange.agree(description(self.made_with, self.parameters, self.codec.name, self._loss_scaling, places))
            agreed = group.regroup(exchange, self.memory, mine, self.parameters.rule.averages)
            if agreed is None:  # all ranks are new
                exchange.agree({"density of set_density()": self._density})
        except Exception:
            exchange.roll_back(*before)  # memory is still the old group's share
            raise
        if agreed is not None:
            self._go_to(agreed)
        self._settled()

    def checked_density(self, density: float) -> float:
        """Returns a density that DGCConfig takes.

        Raises:
            ValueError: it does not.
        """
        return replace(self.made_with, density=density).density

    def set_density(self, density: float) -> None:
        """Changes the density on all ranks; see DGCState.set_density."""
        if self.exchange.changed:
            self.regroup()
        self.exchange.agree({"density": density})
        self._use_density(density)

    def _use_density(self, density: float | None) -> None:
        if density != self._density:
            self._density = density
            self.config = self.made_with if density is None else replace(self.made_with, density=density)
            self.layouts.use(self.config)

    def share(self) -> Share:
        """Returns the description of this rank's share, and of the state of the run."""
        topology = self.exchange.topology
        return Share(
            rank=topology.share,
            world_size=topology.shares,
            step=self.step,
            dense=self.dense,
            diverged=sorted(self.memory.diverged),
            kinds=list(self.memory.kinds),
            density=self._density,
            place=topology.place,
            places=topology.places,
            entries=self.layouts.allotted(),
            choices=[] if self.auto is None else [asdict(choice) for choice in self.auto.choices.values()],
        )

    def own(self) -> dict[str, Any]:
        """Returns this rank's share with views of its tensors."""
        share = self.share()
        pieces = {"pieces": pieces_of(self.parameters.slots)} if share.places > 1 else {}
        return {**asdict(share), **pieces, **self.memory.state_dict()}

    def choose(self, parts: Sequence[Mapping[str, Any]], allow_missing_ranks: bool) -> shares.Choice:
        """Returns this rank's part of saved shares, and changes nothing; raises as shares.choose()."""
        topology = self.exchange.topology
        choice = shares.choose(self.memory, parts, topology.share, topology.shares, allow_missing_ranks)
        if choice.share.dense and self.divided:
            raise ValueError("state_dict: expected one that was saved with state.dense = False. " + advice.no_dense())
        # The k's are those of this rank's own part of the model, where it was divided in the same way.
        place = topology.place, topology.places
        ks = next((s.entries for s in map(Share.of, parts) if (s.place, s.places) == place), [])
        choice = choice._replace(share=replace(choice.share, entries=ks))
        rule, kinds = self.parameters.rule, choice.share.kinds
        # What waits is a sum of gradients beside momentum or nothing, and one of finished updates beside other kinds.
        known = rule.may_keep or (MOMENTUM,)
        # A statistic cannot begin at zero: with the number of gradients so far, divisors would be far too small.
        if [kind for kind in kinds if kind not in known] or [kind for kind in rule.averages if kind not in kinds]:
            raise ValueError(
                f"state_dict: expected what {type(self.parameters.optimizer).__name__} keeps, "
                f"{', '.join(rule.may_keep) or 'nothing'}, got {', '.join(kinds) or 'nothing'}: it was saved with "
                "another optimizer. Load it with that one"
            )
        return choice

    def _kinds_of(self, saved: Share) -> list[str]:
        """Returns the kinds of a saved share that this optimizer's rule keeps; a foreign optimizer keeps none."""
        return [kind for kind in saved.kinds if kind in self.parameters.rule.may_keep]

    def take_what_is_added(self) -> None:
        """Adds to memory what the optimizer keeps beside it, so that memory has all of it."""
        for p, kinds in self.parameters.rule.added().items():
            self.memory.allocate(kinds)
            for kind, value in kinds.items():
                self.memory.of(self.parameters.slot(p).name)[kind].add_(value)

    def means(self) -> dict[str, dict[str, Tensor]]:
        """Returns the mean over the ranks of the rule's tensors, by kind and name; a collective."""
        found: dict[str, dict[str, Tensor]] = {}
        for kind in self.memory.kinds:
            found[kind] = {name: self.memory.of(name)[kind].clone() for name in self.memory.slots}
            if differ := [found[kind][name] for name in self.memory.slots if name in self.memory.diverged]:
                flat = torch.cat([tensor.reshape(-1) for tensor in differ])
                transfer = self.exchange.start(f"mean of {kind}", None, None, flat)
                self.exchange.finish()
                transfer.done.wait()
                with transfer.arrived():
                    for tensor, mean in zip(differ, flat.split([t.numel() for t in differ]), strict=True):
                        tensor.copy_(mean.view(tensor.shape))
        return found

    def release(self) -> None:
        """Frees memory and buffers; the run is over."""
        self.layouts.leave()
        self.memory.release()

    def take_up(self, choice: shares.Choice) -> None:
        """Continues a run from the state_dicts chosen for this rank."""
        exchange = self.own_exchange
        ranks = exchange.ranks if isinstance(exchange, DistributedExchange) else None
        loaded_for = ranks if exchange.changed and not self.joined else self._loaded_for
        rule = self.parameters.rule
        self.memory.load(choice.parts, self._kinds_of(choice.share), choice.share.diverged, rule.averages)
        if choice.missing:
            shares.log_lost(choice.missing, choice.share.world_size)
        self.parameters.brought()  # removes a dense run's tensors, which the loaded ones replace
        self._go_to(choice.share)
        self._settled()
        self._loaded_for = loaded_for

    def take_over(self, old: Standing) -> dict[str, dict[str, Tensor]]:
        """Goes on with another standing's step, density and memory; returns what finds no place in this one's."""
        self.memory.allocate(old.memory.kinds)
        left = move(old.memory, self.memory)
        self.step, self.dense = old.step, old.dense
        self._use_density(old._density)
        self.memory.ages = old.memory.ages
        self._settled()
        self.dropped = old.dropped
        self.layouts.allotment = old.layouts.allotment
        return left

    def _go_to(self, share: Share) -> None:
        self.step, self.dense = share.step, share.dense
        self.layouts.take_allotted(share.entries)
        self._use_density(share.density)
        if self.auto is not None:
            self.auto.load(map(Choice.of, share.choices))

    def _settled(self) -> None:
        self.joined, self.dropped = True, 0
        self._loaded_for = None
        if self.memory.ages is not None:  # of other elements, or of another run's steps
            self.memory.watch(self.memory.ages.sample, self.step)
        self.layouts.leave()
        if self.auto is not None:
            self.auto.leave()
