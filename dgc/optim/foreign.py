"""Foreign: the rule of any torch optimizer without momentum, plain accumulation (paper, Algorithm 1)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from .base import Claimer, DGCOptimizer, Reducer, Rule
from .plain import Plain

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def rule_of(optimizer: Optimizer) -> Rule:
    """Returns an optimizer's rule: its own, or that of plain accumulation."""
    return optimizer.rule() if isinstance(optimizer, DGCOptimizer) else Foreign(optimizer)


class Foreign(Plain):
    """Adds gradients to v, and keeps no other tensor.

    A pre-hook of step() claims the reduced gradients before the optimizer applies them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Takes the optimizer."""
        self.optimizer = optimizer
        self._attached: weakref.ref[Claimer] | None = None
        self._hook: RemovableHandle | None = None

    def check(self) -> None:
        """Refuses momentum, which would be applied a second time.

        Raises:
            ValueError: a group has momentum, from the start or since a schedule or load_state_dict() changed it.
        """
        if any(group.get("momentum", 0) for group in self.optimizer.param_groups):
            raise ValueError(
                f"optimizer: expected dgc.SGD, got {_full_name(self.optimizer)} with momentum > 0. DGC applies "
                "momentum before it selects what to send; a second one would be applied to the sparse updates. Use "
                "dgc.SGD with the same arguments"
            )

    def check_use(self, *, loss_scaling: bool, skipping: bool) -> None:
        """Refuses Adam, and uses that the optimizer cannot support; warns unless it is torch.optim.SGD.

        Raises:
            ValueError: it is an Adam; steps are to be left out; or loss is scaled for a fused optimizer.
        """
        kind = type(self.optimizer).__name__
        if "adam" in kind.lower():
            ours = "Adam" if kind == "Adam" else "AdamW"
            raise ValueError(
                f"optimizer: expected dgc.{ours}, got {_full_name(self.optimizer)}, which takes sparse averages of "
                "what has waited for gradients: sums of many steps and zeros between them mislead its moments "
                "(docs/results.md). Write "
                f"optimizer = dgc.{ours}(model.parameters(), lr=...), with the arguments of torch.optim.{ours}"
            )
        if loss_scaling and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"optimizer: expected {kind}(fused=False) with a GradScaler, which calls step() of a fused one also "
                "where the step is to be left out"
            )
        if skipping:
            raise ValueError(
                f'on_nonfinite: expected "raise" with {kind}; only dgc.SGD, dgc.AdamW and dgc.Adam can leave a step out'
            )
        if not isinstance(self.optimizer, torch.optim.SGD):
            warnings.warn(
                f"dgc: {kind} gets averages that are zero but for few entries, each the sum of many steps, and takes "
                "them for gradients. Nobody has shown that it trains well so, and it may not: dgc.SGD and dgc.AdamW "
                "accumulate what they apply, and are measured",
                stacklevel=5,
            )

    def attach(self, reducer: Claimer) -> None:
        """Registers a pre-hook of step() that claims the gradients."""
        self._attached = weakref.ref(reducer)
        self._hook = self.optimizer.register_step_pre_hook(_before_step(self._attached))

    def release(self, reducer: Claimer) -> None:
        """Removes the pre-hook."""
        if self._hook is not None:
            self._hook.remove()

    def serves(self, reducer: Reducer) -> bool:
        """Returns True: every attached DGCState has a pre-hook, which raises if that state has reduced nothing."""
        return True

    @property
    def keeps_state(self) -> bool:
        """Whether the optimizer is another one than torch.optim.SGD."""
        return not isinstance(self.optimizer, torch.optim.SGD)


def _before_step(reference: weakref.ref[Claimer]) -> Callable[..., Arguments | None]:
    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        state = reference()
        if state is None:
            return None
        # torch passes step()'s arguments to the hook with the optimizer in front, and expects them back in that form.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            state.take_for()
            return None

        def checked() -> Any:
            loss = closure()  # runs the backward pass
            state.take_for()
            return loss

        return (optimizer, checked), {key: value for key, value in kwargs.items() if key != "closure"}

    return before_step


def _full_name(optimizer: Optimizer) -> str:
    """Returns the name of an optimizer's class; of torch's with torch.optim, since ours have the same names."""
    name = type(optimizer).__name__
    theirs = getattr(torch.optim, name, None)
    # Horovod derives a class of the same name.
    return f"torch.optim.{name}" if isinstance(theirs, type) and isinstance(optimizer, theirs) else name
