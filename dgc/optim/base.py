"""The interface to optimizers: a Rule accumulates gradients before they are sent; an optimizer applies the result."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .apply import all_zero
from .work import Work

MASKED_BELOW = 0.01
"""Density below which DGCConfig.momentum_masking "auto" masks the momentum of SGD."""


class Reducer(Protocol):
    """The part of DGCState that an optimizer uses."""

    def collect(self) -> None:
        """Exchanges gradients, where step() is to do it."""

    @property
    def pending(self) -> bool:
        """Whether there are reduced gradients that no step() has claimed."""

    def take(self) -> bool:
        """Claims the gradients of the last backward pass; returns False if this step is to be left out."""

    @property
    def skip(self) -> Tensor | None:
        """The GPU's verdict on the claimed step, a uint8 scalar: not 0 if it must change nothing; None without one."""

    @property
    def unscales(self) -> bool:
        """Whether the DGCState has the user's GradScaler, and unscales the gradients by it."""

    def kept_of(self, parameter: Tensor) -> dict[str, Tensor] | None:
        """Returns the rule's tensors of a parameter that was sent dense; None for a compressed one."""


class Claimer(Reducer, Protocol):
    """The part of DGCState that a rule uses. It also claims gradients for an optimizer that is not ours."""

    def take_for(self) -> None:
        """Claims the gradients for an optimizer that is not ours, or raises."""


class Rule(ABC):
    """The accumulation of gradients for an optimizer: the tensors kept of each parameter, and their updates of v.

    Attributes:
        optimizer: the optimizer that has this rule.
        fused: whether one op does all of compress(); else compress() first writes the updates to a tensor of their own.
        averages: the kinds that are a statistic of the gradients and no part of the update. Ranks that come or go take
            their mean over, where they divide the other kinds and v among themselves.
        masked_below: density below which DGCConfig.momentum_masking "auto" masks.
        named: what numbers() are, for the message where ranks differ.
    """

    optimizer: Optimizer
    fused = True
    averages: tuple[str, ...] = ()
    masked_below = MASKED_BELOW
    named = "numbers of the rule"

    @property
    def masked(self) -> tuple[str, ...]:
        """The kinds that become 0 where an entry is sent (section 3.2): an op's first, or any of a rule without one."""
        return self.kept[:1] if self.fused else self.kept

    @property
    def may_keep(self) -> tuple[str, ...]:
        """The kinds of tensor that the rule may keep of each parameter at any time."""
        return self.kept

    @property
    @abstractmethod
    def kept(self) -> tuple[str, ...]:
        """The kinds of tensor that the rule keeps of each parameter at present, by their names in checkpoints."""

    @abstractmethod
    def factors(self, parameter: Tensor, group: Mapping[str, Any], workers: int) -> tuple[float, ...]:
        """Returns the numbers that go into compress() for one parameter in the coming pass.

        Args:
            parameter: the optimizer's state may hold more of it, as the steps that it has taken.
            group: its parameter group, as it is now.
            workers: the number of gradients whose mean is the update.
        """

    @abstractmethod
    def check(self) -> None:
        """Checks the parameter groups; called before each pass, since schedules and load_state_dict() change them.

        Raises:
            ValueError: a group has a value that cannot be honoured.
        """

    @abstractmethod
    def check_use(self, *, loss_scaling: bool, skipping: bool) -> None:
        """Checks once that the optimizer can be used in this way, and warns of an optimizer that is outside the paper.

        Args:
            loss_scaling: whether a GradScaler scales the loss.
            skipping: whether steps are to be left out (DGCConfig.on_nonfinite).

        Raises:
            ValueError: it cannot.
        """

    @abstractmethod
    def attach(self, reducer: Claimer) -> None:
        """Makes the optimizer use this DGCState, without keeping it alive."""

    @abstractmethod
    def serves(self, reducer: Reducer) -> bool:
        """Returns whether the optimizer uses this DGCState, and not one that was made later."""

    def release(self, reducer: Claimer) -> None:  # noqa: B027  (nothing where a DGCState is not asked again)
        """Makes the optimizer forget this DGCState."""

    @property
    @abstractmethod
    def keeps_state(self) -> bool:
        """Whether the optimizer keeps state between steps, which a rank without step() would miss."""

    @abstractmethod
    def compress(self, work: Work) -> None:
        """Accumulates gradients in the rule's tensors and in v, then selects and packs the largest entries of v."""

    def numbers(self) -> list[tuple[float, ...]]:
        """Returns the numbers by parameter group that all ranks must have alike."""
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        return [self.factors(group["params"][0], group, workers=1) for group in groups]

    def accumulated(self, parameters: Sequence[Tensor], times: int = 1) -> None:  # noqa: B027  (most count nothing)
        """Counts a pass that has accumulated gradients of compressed parameters; with -1, one that was dropped."""

    def brought(self) -> dict[Tensor, dict[str, Tensor]]:
        """Removes the tensors of a dense run from the optimizer's state, and returns them by parameter and kind."""
        return {}

    def added(self) -> dict[Tensor, dict[str, Tensor]]:
        """Removes what the optimizer keeps beside the rule's tensors and adds to them, by parameter and kind."""
        return {}

    def beside(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns what the optimizer keeps of a parameter in its own state, and moves it by in later steps."""
        return {}

    @property
    def steps_taken(self) -> int:
        """Number of steps in the optimizer's state; 0 where it does not count them."""
        counts = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        return int(max(map(float, counts), default=0))


class DGCOptimizer(Optimizer):
    """An optimizer that applies the gradients that a DGCState has reduced."""

    # The name of torch's optimizer that it is without DGC; its own is the same.
    _twin: ClassVar[str] = ""
    # Weak references, so that a dropped DGCState frees its memory at once. The class has an empty tuple, so that step()
    # of a copy without a DGCState says what is missing.
    _attached: tuple[weakref.ref[Reducer], ...] = ()

    def rule(self) -> Rule:
        """Returns the rule by which gradients are accumulated before they are sent.

        Raises:
            NotImplementedError: the class does not say.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.rule: expected a method that returns a dgc.optim.base.Rule, got none. "
            "docs/contributing.md says what a rule is"
        )

    def attach(self, reducer: Reducer) -> None:
        """Names the DGCState that reduces the gradients, without keeping it alive; DGCState calls this itself."""
        self._attached = (*(one for one in self._attached if one() is not None), weakref.ref(reducer))

    @property
    def reducer(self) -> Reducer | None:
        """The DGCState that reduces the gradients: the last one attached that is alive; None without one."""
        return next((reducer for one in reversed(self._attached) if (reducer := one()) is not None), None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Applies the reduced gradients.

        Raises:
            RuntimeError: there are gradients, but no DGCState has reduced since the last step, so that what the rule
                accumulates would be missing without a word.
            ValueError: a parameter group has a value that DGC cannot honour.
            FloatingPointError: a gradient was not finite on some rank (DGCConfig.on_nonfinite). On a GPU the device
                leaves the step out, and the next step() raises.
        """
        self._check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._claims(parameters):
            self._apply(self.reducer)
        return loss

    def _claims(self, parameters: Sequence[Tensor]) -> bool:
        """Claims the gradients of the last pass; returns False if there are none, or the step is to be left out."""
        reducer = self.reducer
        if reducer is not None:
            reducer.collect()
        pending = reducer is not None and reducer.pending
        if not pending and all_zero(parameters):
            self._allocate(parameters)
            return False
        if reducer is not None:
            return reducer.take()
        if self._needs_reducer():
            raise RuntimeError(
                f"dgc.{self._twin}: expected a DGCState to have reduced these gradients, got none, so momentum would "
                "be missing. Create state = dgc.DGCState(model.named_parameters(), optimizer), keep it, and register "
                "it: state.register(model); with Horovod, wrap the optimizer: "
                "dgc.horovod.DistributedOptimizer(optimizer, model.named_parameters()). Without DGC, use "
                f"torch.optim.{self._twin}"
            )
        return True

    def _check(self) -> None:
        """Checks the parameter groups; raises ValueError."""

    def _apply(self, reducer: Reducer | None) -> None:
        """Changes all parameters that have a gradient.

        Raises:
            NotImplementedError: the class does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__}._apply: expected a method that applies gradients, got none")

    def _allocate(self, parameters: Sequence[Tensor]) -> None:
        """Makes the state of some parameters that step() would make."""

    def _needs_reducer(self) -> bool:
        """Returns whether the optimizer does nothing sensible without a DGCState."""
        return True

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """The answer to GradScaler.step(), its only reader: False, GradScaler has to unscale the gradients itself.

        Raises:
            RuntimeError: the DGCState does not know of the loss scale, and has accumulated scaled gradients.
        """
        reducer = self.reducer
        if reducer is not None and not reducer.unscales:
            raise RuntimeError(
                "GradScaler.step: expected a DGCState that knows of the loss scale, got one that has accumulated "
                "scaled gradients, which a change of scale makes wrong: DGCState(..., grad_scaler=scaler), or "
                "dgc.horovod.DistributedOptimizer(..., grad_scaler=scaler)"
            )
        return False
