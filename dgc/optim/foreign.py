"""Foreign: any torch optimizer without momentum behind the face of a Rule; plain accumulation (paper, Algorithm 1)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from dgc import ops

from .base import Claimer, DGCOptimizer, Reducer, Rule, Work

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def rule_of(optimizer: Optimizer) -> Rule:
    """Returns an optimizer's rule: its own, or that of plain accumulation."""
    return optimizer.rule() if isinstance(optimizer, DGCOptimizer) else Foreign(optimizer)


class Foreign(Rule):
    """Keeps nothing: gradients go into v, and the optimizer applies what was sent of it.

    A hook has the gradients claimed before step() applies them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Takes the optimizer."""
        self.optimizer = optimizer
        self._attached: weakref.ref[Claimer] | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def factors(self, parameter: Tensor, group: Mapping[str, Any], workers: int) -> tuple[float, ...]:
        """Returns none."""
        return ()

    def check(self) -> None:
        """Refuses momentum, which would be applied a second time.

        Raises:
            ValueError: a group has some, from the start or since a schedule or load_state_dict() changed it.
        """
        if any(group.get("momentum", 0) for group in self.optimizer.param_groups):
            raise ValueError(
                f"optimizer: expected dgc.SGD, got {type(self.optimizer).__name__} with momentum > 0. DGC applies "
                "momentum before it selects what to send; a second one would be applied to the sparse updates. Use "
                "dgc.SGD with the same arguments"
            )

    def check_use(self, *, loss_scaling: bool, skipping: bool) -> None:
        """Refuses what the optimizer cannot do, and warns of one that keeps more than SGD does.

        Raises:
            ValueError: it has to leave steps out, or is fused and would not let a GradScaler.
        """
        kind = type(self.optimizer).__name__
        if loss_scaling and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"optimizer: expected {kind}(fused=False) with a GradScaler, which calls step() of a fused one also "
                "where the step is to be left out"
            )
        if skipping:
            raise ValueError(f'on_nonfinite: expected "raise" with {kind}; only dgc.SGD can leave a step out')
        if not isinstance(self.optimizer, torch.optim.SGD):
            warnings.warn(
                f"dgc: {kind} is outside the paper: what it keeps of earlier gradients, or takes from their size, is "
                "misled by sparse, delayed ones. Accuracy may suffer; dgc.SGD is what DGC was made for",
                stacklevel=5,
            )

    def attach(self, reducer: Claimer) -> None:
        """Has the optimizer ask before each step()."""
        self._attached = weakref.ref(reducer)
        self.optimizer.register_step_pre_hook(_before_step(self._attached))

    def serves(self, reducer: Reducer) -> bool:
        """Returns True: a second DGCState asks too, and says that nothing was reduced by it."""
        return True

    @property
    def keeps_state(self) -> bool:
        """Whether it is another than torch.optim.SGD."""
        return not isinstance(self.optimizer, torch.optim.SGD)

    def compress(self, work: Work) -> None:
        """Adds gradients to v, and selects and packs."""
        ops.compress_(
            gradients=work.gradients,
            momentum=None,
            residual=work.residual,
            segments=work.receiving.table,
            mu=work.factors[0],
            scale=work.scale,
            payload=work.selection,
            workspace=work.workspace,
            sent_momentum=None,
            nesterov=False,
            wire_dtype=work.dtype,
        )


def _before_step(reference: weakref.ref[Claimer]) -> Callable[..., Arguments | None]:
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
