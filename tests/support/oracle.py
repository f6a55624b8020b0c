"""N ranks of Deep Gradient Compression in float64 numpy, written from the equations alone.

They are those of the paper (Algorithms 4 and 5), for gradients that are means over each rank's own batch. This file
shares no code with dgc and imports none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Oracle:
    """Replays training on all ranks at once. Parameters are flat float64 arrays by name."""

    def __init__(
        self,
        parameters: Mapping[str, Array],
        world_size: int,
        compressed: set[str],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self.p = {name: np.array(value, dtype=np.float64).ravel() for name, value in parameters.items()}
        self.n = world_size
        self.compressed = compressed
        self.lr, self.mu, self.nesterov, self.decay, self.clip_norm = lr, momentum, nesterov, weight_decay, clip_norm
        self.u = [{name: np.zeros_like(v) for name, v in self.p.items()} for _ in range(world_size)]
        self.v = [{name: np.zeros_like(v) for name, v in self.p.items()} for _ in range(world_size)]
        self.dense_u = {name: np.zeros_like(v) for name, v in self.p.items()}
        self.decay_u = {name: np.zeros_like(v) for name, v in self.p.items()}

    def step(self, gradients: list[Mapping[str, Array]], density: float, masking: bool) -> None:
        """One step; gradients by rank, then by name."""
        h = [{name: np.asarray(g[name], dtype=np.float64).ravel() for name in self.p} for g in gradients]
        if self.clip_norm is not None:
            for rank in range(self.n):
                norm = math.sqrt(sum(float((x * x).sum()) for x in h[rank].values()))
                factor = min(1.0, math.sqrt(self.n) * self.clip_norm / norm)
                h[rank] = {name: factor * x for name, x in h[rank].items()}
        for name, p in self.p.items():
            update = np.zeros_like(p)
            if name in self.compressed:
                for rank in range(self.n):
                    update += self._sent(rank, name, h[rank][name], density, masking)
                update /= self.n
            else:
                mean = sum(h[rank][name] for rank in range(self.n)) / self.n
                u = self.dense_u[name]
                u[:] = self.mu * u + mean
                update = mean + self.mu * u if self.nesterov else u
            if self.decay:
                u, term = self.decay_u[name], self.decay * p
                u[:] = self.mu * u + term
                update = update + (term + self.mu * u if self.nesterov else u)
            self.p[name] = p - self.lr * update

    def _sent(self, rank: int, name: str, h: Array, density: float, masking: bool) -> Array:
        u, v = self.u[rank][name], self.v[rank][name]
        u[:] = self.mu * u + h
        v += h + self.mu * u if self.nesterov else u
        k = max(1, math.ceil(density * v.size))
        # A stable sort by falling magnitude: ties to the smaller index.
        chosen = np.argsort(-np.abs(v), kind="stable")[:k]
        sent = np.zeros_like(v)
        sent[chosen] = v[chosen]
        v[chosen] = 0.0
        if masking:
            u[chosen] = 0.0
        return sent
