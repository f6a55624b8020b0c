"""Layouts: the buckets of the present phase, laid out when their gradients come for the first time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dgc.config import DGCConfig
from dgc.exchange.base import Exchange, Islands
from dgc.memory.memory import Memory, return_free_memory
from dgc.memory.parameters import Parameters
from dgc.memory.slots import Gradients, Slot
from dgc.ops.codec import Codec

from .allotment import Allotment, Evidence
from .bucket import Bucket
from .node import Node
from .phase import Phase, compresses, phase_at
from .schedule import DensitySchedule, entries, least_entries


class Layouts:
    """The present phase of the run, and the buckets laid out for it."""

    phase: Phase

    def __init__(
        self,
        config: DGCConfig,
        parameters: Parameters,
        memory: Memory,
        exchange: Exchange,
        codec: Codec,
        inside: Islands | None,
    ) -> None:
        """Starts in no phase, without buckets.

        Args:
            config: the user's.
            parameters: of the model.
            memory: this rank's.
            exchange: the collectives.
            codec: turns entries into bytes.
            inside: the collectives of a node whose ranks divide what is compressed; None where they do not.
        """
        self._inside = inside
        self.allotment = Allotment()
        self._nodes: dict[tuple[str, ...], Node] = {}
        self.alive: dict[str, int] = {}
        """Number of elements that are alive, of masked parameters."""
        self.use(config)
        self._parameters = parameters
        self._memory = memory
        self._exchange = exchange
        self._codec = codec
        self._key: tuple[object, ...] = ()
        self._buckets: dict[tuple[str, ...], Bucket] = {}

    def use(self, config: DGCConfig) -> None:
        """Uses a configuration from the next pass on."""
        self._config = config
        self.schedule = DensitySchedule(config)

    def compresses(self, density: float) -> bool:
        """Returns whether steps at a density compress a parameter, unless all is sent dense; the same on all ranks."""
        parameters, rows = self._parameters, self._exchange.topology.rows
        return compresses(
            density,
            self._config,
            parameters.slots,
            parameters.never_compressed,
            rows=rows,
            entry_bytes=self._codec.entry_bytes(density),
        )

    def enter(self, step: int, whole: str) -> bool:
        """Enters the phase of a step; returns whether it is a new one.

        Args:
            step: from 0.
            whole: why all parameters are sent dense; empty where they are not.
        """
        kinds = tuple(self._memory.kinds)  # buckets have a buffer for the masked values of each
        density, rows = self.schedule.density(step), self._exchange.topology.rows
        key = (density, whole, rows)
        changed = key != self._key[:-1]
        if (*key, kinds) != self._key:
            self._buckets.clear()
            self._nodes.clear()
        self._key = (*key, kinds)
        if changed:
            parameters = self._parameters
            self.phase = phase_at(
                density,
                self._config,
                parameters.slots,
                parameters.never_compressed,
                rows=rows,
                entry_bytes=self._codec.entry_bytes(density),
                whole=whole,
                divided=self._inside is not None,
                masked_below=parameters.rule.masked_below,
            )
            if self._config.selection == "global":
                self._allot()
            return_free_memory()
        return changed

    def _allot(self) -> None:
        """Makes the k's of one selection over all parameters fit the present phase."""
        slots = self._parameters.slots
        compressed = [slots[name] for name in self._parameters.compressed if name not in self.phase.dense]
        bounds = {slot.name: self._bounds(slot) for slot in compressed}
        density = self.phase.density
        self.allotment.enter({name: entries(density, most, least) for name, (least, most) in bounds.items()}, bounds)

    def _bounds(self, slot: Slot) -> tuple[int, int]:
        """Returns the fewest entries that a parameter sends, and the most: its elements that are alive."""
        most = max(1, self.alive.get(slot.name, slot.numel))
        return min(most, least_entries(self._config, slot.numel, slot.piece.whole)), most

    def _entries(self, slot: Slot) -> int | None:
        """Returns k of a parameter at the next step; None where it is sent dense."""
        if slot.name in self.phase.dense:
            return None
        if self._config.selection == "global":
            return self.allotment.entries[slot.name]
        least, most = self._bounds(slot)
        return entries(self.phase.density, most, least)

    def allotted(self) -> list[int]:
        """Returns the k's of one selection over all parameters, in their order, 0 where dense; else an empty list."""
        ks = self.allotment.entries
        return [ks.get(name, 0) for name in self._parameters.compressed] if ks else []

    def take_allotted(self, ks: Sequence[int]) -> None:
        """Takes what allotted() has returned. It may be that of a model divided otherwise, and is then made to fit."""
        names = self._parameters.compressed
        fit = len(ks) == len(names) and self._config.selection == "global"
        self.allotment.entries = {name: k for name, k in zip(names, ks, strict=True) if k} if fit else {}

    def learn(self, buckets: Iterable[Bucket]) -> None:
        """Moves entries between parameters by what a pass has received, and forgets the buckets of those that changed.

        Args:
            buckets: of the pass, whose verdict has been read.
        """
        found: dict[str, Evidence] = {}
        for bucket in buckets:
            if bucket.sparse is not None and bucket.evidence is not None:
                columns = bucket.evidence.t().tolist()
                for member, (lowest, total, used) in zip(bucket.sparse.members, columns, strict=True):
                    found[member.slot.name] = Evidence(lowest, total, bool(used))
                bucket.evidence = None
        if not found:
            return
        before = self.allotment.entries
        self.allotment.learn(found, self._exchange.topology.rows)
        changed = {name for name, k in self.allotment.entries.items() if k != before[name]}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if changed.isdisjoint(key)}

    def leave(self) -> None:
        """Forgets phase and buckets, after ranks have come or gone or memory was loaded."""
        self._key = ()
        self._buckets.clear()
        self._nodes.clear()

    def of(self, gradients: Gradients) -> Bucket:
        """Returns the bucket of these gradients."""
        key = tuple(slot.name for slot in gradients.slots)
        if key not in self._buckets:
            self._buckets[key] = Bucket(
                gradients,
                [self._entries(slot) for slot in gradients.slots],
                [self.alive.get(slot.name, slot.numel) for slot in gradients.slots],
                self._parameters,
                self._memory,
                self._exchange,
                self._codec,
                self._config,
                masking=self.phase.masking,
            )
        return self._buckets[key]

    def node_of(self, gradients: Gradients) -> Node | None:
        """Returns the way of these whole gradients through the node; None where they do not go through it."""
        if self._inside is None:
            return None
        key = tuple(slot.name for slot in gradients.slots)
        if key not in self._nodes:
            compressed, density = set(self._parameters.compressed), self.phase.density
            self._nodes[key] = Node(gradients, compressed, self._config, density, self._inside, self._codec.dtype)
        return self._nodes[key]

    def keep(self, used: Iterable[Bucket]) -> None:
        """Forgets all buckets but those of the last pass, since DDP changes its buckets after the first pass.

        Buckets that serve one pass only are forgotten too.
        """
        kept = {id(bucket) for bucket in used if not bucket.averages_once}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if id(bucket) in kept}
        self._nodes = {key: node for key, node in self._nodes.items() if key in self._buckets}
