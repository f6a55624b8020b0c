"""dgc.OuterSGD: SGD whose momentum is applied to the mean of what was sent, for the rounds of dgc.LocalSteps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dgc.local import gradient_of, local

from .apply import subtract, with_momentum
from .base import DGCOptimizer, Reducer, Rule
from .own import Own
from .plain import Plain

MOMENTUM_BUFFER = "momentum_buffer"
"""The name that torch.optim.SGD has for it."""


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses parameter groups whose values are out of range.

    Raises:
        ValueError: the message names the value.
    """
    for group in groups:
        if not group["lr"] >= 0:
            raise ValueError(f"lr: expected a number >= 0, got {group['lr']!r}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {group['momentum']!r}")


class OnMean(Plain, Own):
    """Plain accumulation for an optimizer that applies momentum to the mean."""

    def __init__(self, optimizer: OuterSGD) -> None:
        """Takes the optimizer."""
        self.optimizer: OuterSGD = optimizer

    def check(self) -> None:
        """Refuses values that are out of range.

        Raises:
            ValueError: the message names the value.
        """
        check_groups(self.optimizer.param_groups)

    @property
    def keeps_state(self) -> bool:
        """Whether there is momentum."""
        return any(group["momentum"] for group in self.optimizer.param_groups)


class OuterSGD(DGCOptimizer):
    """SGD with momentum on the mean of what islands have sent: DiLoCo's outer optimizer (arXiv 2311.08105).

    m <- momentum * m + mean; p <- p - lr * m, or with Nesterov p <- p - lr * (mean + momentum * m). Momentum is
    equal on all islands, and is neither sent nor masked. dgc.SGD is the other way: there each island has a momentum of
    its own, in front of the selection.

    Args:
        params: as torch.optim.SGD's.
        lr: 0.7 in DiLoCo.
        momentum: 0.9 in DiLoCo.
        nesterov: True in DiLoCo.

    Raises:
        ValueError: an argument is out of range.
    """

    _twin = "SGD"

    def __init__(self, params: ParamsT, lr: float = 0.7, momentum: float = 0.9, nesterov: bool = True) -> None:
        """Checks the arguments; see the class."""
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        check_groups([defaults])
        super().__init__(params, defaults)

    def rule(self) -> Rule:
        """Returns plain accumulation."""
        return OnMean(self)

    def _needs_reducer(self) -> bool:
        return False

    def _check(self) -> None:
        check_groups(self.param_groups)

    def _apply(self, reducer: Reducer | None) -> None:
        skip = reducer.skip if reducer is not None else None
        for group in self.param_groups:
            held = [(p, gradient) for p in group["params"] if (gradient := gradient_of(p)) is not None]
            mu = group["momentum"]
            us = [self._momentum_of(p) if mu else None for p, _ in held]
            updates = with_momentum([gradient for _, gradient in held], us, mu, group["nesterov"], skip)
            subtract([local(p) for p, _ in held], updates, group["lr"], skip)

    def _momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if MOMENTUM_BUFFER not in state:
            state[MOMENTUM_BUFFER] = torch.zeros_like(p)
        return local(state[MOMENTUM_BUFFER])
