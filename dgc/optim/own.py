"""Own: what the rules of dgc's own optimizers have in common."""

from __future__ import annotations

from .base import Claimer, DGCOptimizer, Reducer, Rule


class Own(Rule):
    """The rule of a DGCOptimizer, which asks its DGCState for the gradients and can leave a step out."""

    optimizer: DGCOptimizer

    def check_use(self, *, loss_scaling: bool, skipping: bool) -> None:
        """Accepts every use."""

    def attach(self, reducer: Claimer) -> None:
        """Makes the optimizer use this DGCState."""
        self.optimizer.attach(reducer)

    def release(self, reducer: Claimer) -> None:
        """Makes the optimizer forget this DGCState."""
        self.optimizer._attached = tuple(one for one in self.optimizer._attached if one() not in (None, reducer))

    def serves(self, reducer: Reducer) -> bool:
        """Returns whether this DGCState is the last one attached that is alive."""
        return self.optimizer.reducer is reducer
