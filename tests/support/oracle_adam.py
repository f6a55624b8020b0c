"""N ranks of Adam whose direction is accumulated, in float64 numpy, written from the equations alone.

They are those of dgc.AdamW: moments of each rank's own gradient, with the second one corrected for noise. The gradient
over the root of that one, times the learning rate, is what waits and is sent. This file shares no code with dgc and
imports none of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class AdamOracle:
    """Replays training on all ranks at once. Parameters are flat float64 arrays by name.

    Attributes:
        p: the parameters, equal on all ranks.
        m, s, v: by rank and name. Those of a dense parameter are equal on all ranks; its v stays zero.
        accumulated: by rank and name, the sum of all that was added to v.
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        world_size: int,
        compressed: Collection[str],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        clip_norm: float | None = None,
    ) -> None:
        self.p = {name: np.array(value, dtype=np.float64).ravel() for name, value in parameters.items()}
        self.n = world_size
        self.compressed = set(compressed)
        self.lr, self.betas, self.eps, self.decay, self.clip_norm = lr, betas, eps, weight_decay, clip_norm
        self.m, self.s, self.v, self.accumulated = (
            [{name: np.zeros_like(x) for name, x in self.p.items()} for _ in range(world_size)] for _ in range(4)
        )
        self.t = 0

    def own(self) -> float:
        """The weight a of h^2 in s. With n = 1, or without momentum, it is 1: plain Adam."""
        beta1 = self.betas[0]
        if beta1 == 0:
            return 1.0
        spread = (1 - beta1) / (1 + beta1)  # variance of m, as a share of that of h
        return max(0.0, (1 / self.n - spread) / (1 - spread))

    def step(self, gradients: list[Mapping[str, Array]], density: float, dense: bool = False) -> None:
        """One step; gradients by rank, then by name. dense: all parameters are averaged."""
        self.t += 1
        h = [{name: np.asarray(g[name], dtype=np.float64).ravel() for name in self.p} for g in gradients]
        if self.clip_norm is not None:
            for rank in range(self.n):
                norm = math.sqrt(sum(float((x * x).sum()) for x in h[rank].values()))
                factor = min(1.0, math.sqrt(self.n) * self.clip_norm / norm)
                h[rank] = {name: factor * x for name, x in h[rank].items()}
        for name in self.p:
            if name in self.compressed and not dense:
                update = sum(self._sent(rank, name, h[rank][name], density) for rank in range(self.n)) / self.n
            else:
                update = self._dense(name, sum(h[rank][name] for rank in range(self.n)) / self.n)
            self.p[name] = (1 - self.lr * self.decay) * self.p[name] - update

    def _sent(self, rank: int, name: str, h: Array, density: float) -> Array:
        (beta1, beta2), a = self.betas, self.own()
        m, s, v = self.m[rank][name], self.s[rank][name], self.v[rank][name]
        m[:] = beta1 * m + (1 - beta1) * h
        mh = m / (1 - beta1**self.t)
        s[:] = beta2 * s + (1 - beta2) * (a * h**2 + (1 - a) * mh**2)
        direction = self.lr * h / (np.sqrt(s / (1 - beta2**self.t)) + self.eps)
        v += direction
        self.accumulated[rank][name] += direction
        k = max(1, math.ceil(density * v.size))
        chosen = np.argsort(-np.abs(v), kind="stable")[:k]  # ties to the smaller index
        sent = np.zeros_like(v)
        sent[chosen] = v[chosen]
        v[chosen] = 0.0
        return sent

    def _dense(self, name: str, g: Array) -> Array:
        beta1, beta2 = self.betas
        # What differed between the ranks while the parameter was compressed becomes its mean, once.
        m = beta1 * sum(of[name] for of in self.m) / self.n + (1 - beta1) * g
        s = beta2 * sum(of[name] for of in self.s) / self.n + (1 - beta2) * g**2
        for rank in range(self.n):
            self.m[rank][name], self.s[rank][name] = m.copy(), s.copy()
        return self.lr * (m / (1 - beta1**self.t)) / (np.sqrt(s / (1 - beta2**self.t)) + self.eps)
