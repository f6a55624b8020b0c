"""Rounds of local steps in float64 numpy, written from the equations of docs/local_steps.md alone.

SparseLoCo (averaging), DiLoCo (Nesterov momentum on the mean) and DGC's momentum correction, over any number of
islands. This file shares no code with dgc and imports none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class RoundOracle:
    """Replays rounds on all islands at once. theta_0 are flat float64 arrays by name."""

    def __init__(
        self,
        start: Mapping[object, Array],
        islands: int,
        compressed: set[object],
        density: float,
        decay: float = 1.0,
        outer: str = "averaging",
        lr: float = 1.0,
        momentum: float = 0.0,
        masking: bool = False,
    ) -> None:
        self.p = {name: np.array(value, dtype=np.float64).ravel() for name, value in start.items()}
        self.n, self.compressed, self.density, self.decay = islands, compressed, density, decay
        self.outer, self.lr, self.mu, self.masking = outer, lr, momentum, masking
        self.e = [{name: np.zeros_like(p) for name, p in self.p.items()} for _ in range(islands)]
        self.u = [{name: np.zeros_like(p) for name, p in self.p.items()} for _ in range(islands)]
        self.m = {name: np.zeros_like(p) for name, p in self.p.items()}

    def round(self, moved: list[Mapping[object, Array]]) -> None:
        """One round; theta_0 - theta by island, then by name."""
        for name, p in self.p.items():
            ways = [np.asarray(m[name], dtype=np.float64).ravel() for m in moved]
            corrected = self.outer == "corrected"
            if name in self.compressed:
                mean = sum(self._sent(r, name, ways[r], corrected) for r in range(self.n)) / self.n
            else:
                mean = sum(ways) / self.n
            if self.outer == "averaging" or (corrected and name in self.compressed):
                update = mean
            else:
                m = self.m[name]
                m[:] = self.mu * m + mean
                update = mean + self.mu * m  # Nesterov
            p -= self.lr * update

    def _sent(self, island: int, name: object, way: Array, corrected: bool) -> Array:
        e, u = self.e[island][name], self.u[island][name]
        if corrected:
            u[:] = self.mu * u + way
            way = way + self.mu * u
        e[:] = self.decay * e + way
        k = max(1, math.ceil(self.density * e.size))
        # A stable sort by falling magnitude: ties to the smaller index.
        chosen = np.argsort(-np.abs(e), kind="stable")[:k]
        sent = np.zeros_like(e)
        sent[chosen] = e[chosen]
        e[chosen] = 0.0
        if corrected and self.masking:
            u[chosen] = 0.0
        return sent
