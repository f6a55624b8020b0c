"""Optimizers that are not ours: a hook has the gradients claimed before step() applies them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Taker(Protocol):
    """What the hook asks of a DGCState."""

    def take_for(self) -> None:
        """Claims the reduced gradients, or raises."""


def watch(optimizer: Optimizer, state: Taker) -> None:
    """Has an optimizer ask before each step(). Like dgc.SGD it does not keep the state alive."""
    optimizer.register_step_pre_hook(_before_step(weakref.ref(state)))


def _before_step(reference: weakref.ref[Taker]) -> Callable[..., Arguments | None]:
    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        state = reference()
        if state is None:
            return None
        # torch hands the hook the arguments of step() with the optimizer in front, and takes them back so.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            state.take_for()
            return None

        def checked() -> Any:
            loss = closure()  # the backward pass is in it
            state.take_for()
            return loss

        return (optimizer, checked), {key: value for key, value in kwargs.items() if key != "closure"}

    return before_step
