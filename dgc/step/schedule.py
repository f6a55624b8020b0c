"""DensitySchedule: the density of each step, and the test of whether a dense exchange is cheaper."""

from __future__ import annotations

import math

from dgc.config import DGCConfig


class DensitySchedule:
    """Warm-up (paper, section 3.3): equal phases of falling density, then the final one."""

    def __init__(self, config: DGCConfig) -> None:
        """Keeps the phases of the warm-up that lie above the final density."""
        self._config = config
        self._phases = tuple(d for d in config.warmup_densities if d > config.density)

    @property
    def final(self) -> float:
        """Density after the warm-up; DGCState.set_density() changes it."""
        return self._config.density

    @final.setter
    def final(self, _: float) -> None:
        raise AttributeError(
            "DensitySchedule.final: expected to be read, got an assignment, on which ranks could not agree. Call "
            "state.set_density(density) on all ranks"
        )

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return self._config.warmup_steps

    @property
    def phases(self) -> tuple[float, ...]:
        """Densities of the warm-up's equal phases."""
        return self._phases

    def warming_up(self, step: int) -> bool:
        """Returns whether a step (from 0) belongs to the warm-up."""
        return step < self.warmup_steps and bool(self.phases)

    def density(self, step: int) -> float:
        """Returns the density of a step (from 0)."""
        if not self.warming_up(step):
            return self.final
        return self.phases[step * len(self.phases) // self.warmup_steps]

    def steps_left(self, step: int) -> float:
        """Returns the number of steps from a step (from 0) until density changes; infinity after the warm-up."""
        if not self.warming_up(step):
            return math.inf
        phase = step * len(self.phases) // self.warmup_steps
        return -(-(phase + 1) * self.warmup_steps // len(self.phases)) - step


def entries(density: float, numel: int, least: int = 1) -> int:
    """Returns k, the number of entries that are sent of a parameter with numel > 0 elements.

    Args:
        density: share of the entries that is sent.
        numel: of the parameter, or of a piece of it.
        least: the number of entries below which k does not fall, where there are so many; see least_entries().
    """
    # In double precision: in float32, ceil(0.001 * n) is one too many for many multiples of 1000.
    return min(numel, max(least, math.ceil(density * numel)))


def least_entries(config: DGCConfig, numel: int, whole: int) -> int:
    """Returns the entries that a piece of a parameter sends at least: its part of DGCConfig.min_entries, at least one.

    Args:
        config: the user's.
        numel: elements of the piece, > 0.
        whole: those of the whole parameter.
    """
    return min(numel, -(-config.min_entries * numel // whole))


def dense_is_cheaper(density: float, ranks: int, gradient_bytes: int, entry_bytes: float) -> bool:
    """Returns whether a ring all-reduce would carry no more bytes than the all-gather of the sent entries.

    Each of N ranks receives 2 (N-1)/N * gradient_bytes bytes an element by all-reduce, and (N-1) * density *
    entry_bytes by all-gather. With one rank nothing is carried, and density alone decides.

    Args:
        density: share of the entries that is sent.
        ranks: N, those that send a payload each.
        gradient_bytes: of one element.
        entry_bytes: of an entry on the wire, index and value.
    """
    if density >= 1:
        return True
    return ranks > 1 and density * entry_bytes * ranks >= 2 * gradient_bytes
