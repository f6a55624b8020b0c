"""Layouts: the buckets of the present phase, laid out when their gradients come for the first time."""

from __future__ import annotations

from collections.abc import Iterable

from dgc.config import DGCConfig
from dgc.exchange.base import Exchange
from dgc.exchange.islands import IslandExchange
from dgc.memory.memory import Memory, return_free_memory
from dgc.memory.parameters import Parameters
from dgc.memory.slots import Gradients
from dgc.ops.codec import Codec

from .bucket import Bucket
from .node import Node
from .phase import Phase, compresses, phase_at
from .schedule import DensitySchedule, entries


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
        inside: IslandExchange | None,
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
            return_free_memory()
        return changed

    def leave(self) -> None:
        """Forgets phase and buckets, after ranks have come or gone or memory was loaded."""
        self._key = ()
        self._buckets.clear()
        self._nodes.clear()

    def of(self, gradients: Gradients) -> Bucket:
        """Returns the bucket of these gradients."""
        key = tuple(slot.name for slot in gradients.slots)
        if key not in self._buckets:
            phase = self.phase
            alive = [self.alive.get(slot.name, slot.numel) for slot in gradients.slots]
            ks = [
                None if slot.name in phase.dense else entries(phase.density, max(1, n))
                for slot, n in zip(gradients.slots, alive, strict=True)
            ]
            self._buckets[key] = Bucket(
                gradients,
                ks,
                alive,
                self._parameters,
                self._memory,
                self._exchange,
                self._codec,
                self._config,
                masking=phase.masking,
            )
        return self._buckets[key]

    def node_of(self, gradients: Gradients) -> Node | None:
        """Returns the way of these whole gradients through the node; None where they do not go through it."""
        if self._inside is None:
            return None
        key = tuple(slot.name for slot in gradients.slots)
        if key not in self._nodes:
            compressed, density = set(self._parameters.compressed), self.phase.density
            self._nodes[key] = Node(gradients, compressed, density, self._inside, self._codec.dtype)
        return self._nodes[key]

    def keep(self, used: Iterable[Bucket]) -> None:
        """Forgets all buckets but those of the last pass, since DDP changes its buckets after the first pass.

        Buckets that serve one pass only are forgotten too.
        """
        kept = {id(bucket) for bucket in used if not bucket.averages_once}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if id(bucket) in kept}
        self._nodes = {key: node for key, node in self._nodes.items() if key in self._buckets}
