"""Buckets: those of the present phase, made when their gradients come for the first time."""

from __future__ import annotations

from collections.abc import Iterable

from dgc.config import DGCConfig
from dgc.exchange.base import Exchange
from dgc.memory.memory import Memory, return_free_memory
from dgc.memory.parameters import Parameters

from .bucket import Bucket, Gradients, Member
from .phase import Phase, phase_at
from .schedule import DensitySchedule, entries


class Buckets:
    """Which phase the run is in, and the buckets as they are laid out for it."""

    phase: Phase

    def __init__(self, config: DGCConfig, parameters: Parameters, memory: Memory, exchange: Exchange) -> None:
        """Starts in no phase, without buckets."""
        self.use(config)
        self._parameters = parameters
        self._memory = memory
        self._exchange = exchange
        self._key: tuple[object, ...] = ()
        self._buckets: dict[tuple[int, ...], Bucket] = {}

    def use(self, config: DGCConfig) -> None:
        """Goes by a configuration from the next pass on."""
        self._config = config
        self.schedule = DensitySchedule(config)

    def enter(self, step: int, dense: bool) -> bool:
        """Enters the phase of a step; returns whether it is another one than before.

        Args:
            step: from 0.
            dense: whether DGC is switched off.
        """
        momentum = self._memory.momentum is not None  # without it buckets keep no room for what is masked
        density = self.schedule.density(step)
        key = (density, dense, self._exchange.world_size)
        changed = key != self._key[:-1]
        if (*key, momentum) != self._key:
            self._buckets.clear()
        self._key = (*key, momentum)
        if changed:
            parameters = self._parameters
            self.phase = phase_at(
                *(density, self._config, parameters.by_name, parameters.never_compressed),
                *(self._exchange.world_size, dense),
            )
            return_free_memory()
        return changed

    def leave(self) -> None:
        """Forgets phase and buckets: ranks have come or gone, or u and v are others."""
        self._key = ()
        self._buckets.clear()

    def of(self, gradients: Gradients) -> Bucket:
        """Returns the bucket of these gradients.

        Raises:
            ValueError: named_parameters did not have one of their parameters.
        """
        key = tuple(map(id, gradients.parameters))
        if key not in self._buckets:
            members = []
            for index, parameter in enumerate(gradients.parameters):
                name = self._parameters.name(parameter)
                k = None if name in self.phase.dense else entries(self.phase.density, parameter.numel())
                members.append(Member(name, index, k))
            self._buckets[key] = Bucket(
                *(gradients, members, self._memory, self._exchange.world_size, self._exchange.reducible),
                *(self._config, self.phase.masking),
            )
        return self._buckets[key]

    def keep(self, used: Iterable[Bucket]) -> None:
        """Lets go of all buckets but those used that can be used again: momentum is averaged only once."""
        kept = {id(bucket) for bucket in used if not bucket.averaged}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if id(bucket) in kept}
