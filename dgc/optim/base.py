"""The seam to optimizers: a Rule says what is kept of gradients before they are sent; an optimizer applies the rest."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from dgc.ops import Segments


class Reducer(Protocol):
    """What an optimizer asks of the DGCState that reduces its gradients."""

    @property
    def pending(self) -> bool:
        """Whether gradients were reduced that no step() has taken."""

    def take(self) -> bool:
        """Claims the gradients of the last backward pass; False if this step is to be left out."""

    @property
    def skip(self) -> Tensor | None:
        """The device's word on a GPU, a uint8 scalar: not 0 where the claimed step must change nothing."""

    @property
    def unscales(self) -> bool:
        """Whether the DGCState has the GradScaler whose scale gradients carry."""

    def kept_of(self, parameter: Tensor) -> dict[str, Tensor] | None:
        """Returns the rule's tensors of a parameter whose gradient is a plain average; None if it is an update."""


class Claimer(Reducer, Protocol):
    """What a rule asks of a DGCState: for an optimizer that does not ask itself, the claim comes from outside."""

    def take_for(self) -> None:
        """Claims the gradients for an optimizer that is not ours, or raises."""


class Work(NamedTuple):
    """The compressed parameters of one bucket, on their way from gradients to selected entries."""

    gradients: list[Tensor]
    """The tensors that `source` and `offset` of `receiving` refer to; used up, see dgc.ops.compress_."""
    receiving: Segments
    """The segment table of the gradients."""
    updates: list[Tensor]
    """Where `fused` is not set: one float32 tensor for what the rule adds to v; else the gradients."""
    sending: Segments
    """The segment table of the updates; with `fused`, that of the gradients."""
    kinds: Mapping[str, Tensor]
    """What the rule keeps, flat float32, by kind."""
    residual: Tensor
    """v, flat float32."""
    factors: Tensor
    """float32 [numbers, parameters]: Rule.factors of each parameter; at least one row."""
    scale: Tensor
    """float32 [1]: what gradients are multiplied with first."""
    selection: Tensor
    """uint8: receives the selected entries."""
    dtype: torch.dtype
    """That of the values in the selection."""
    workspace: Tensor
    """From dgc.ops.workspace, for `sending`."""
    sent: Mapping[str, Tensor]
    """By kind, float32 [entries]: receives what the rule kept where entries are sent, which then becomes 0 there. Empty
    where nothing is masked."""


class Rule(ABC):
    """What an optimizer keeps of each parameter's gradients, and what of it enters the residual.

    Attributes:
        optimizer: whose rule it is.
        fused: whether one op does it all; else compress() makes updates in a tensor of their own first.
    """

    optimizer: Optimizer
    fused = True

    @property
    @abstractmethod
    def kept(self) -> tuple[str, ...]:
        """The kinds of tensor that it keeps of each parameter now, by the names that they have in checkpoints."""

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
        """Looks at the parameter groups; before each pass, since schedules and load_state_dict() change them.

        Raises:
            ValueError: a group has a value that cannot be honoured.
        """

    @abstractmethod
    def check_use(self, *, loss_scaling: bool, skipping: bool) -> None:
        """Looks once whether the optimizer can be used in this way, and warns of what is outside the paper.

        Args:
            loss_scaling: whether a GradScaler scales the loss.
            skipping: whether steps are to be left out (DGCConfig.on_nonfinite).

        Raises:
            ValueError: it cannot.
        """

    @abstractmethod
    def attach(self, reducer: Claimer) -> None:
        """Has the optimizer ask this DGCState, which it does not keep alive."""

    @abstractmethod
    def serves(self, reducer: Reducer) -> bool:
        """Returns whether the optimizer asks this DGCState, and not one that was made later."""

    @property
    @abstractmethod
    def keeps_state(self) -> bool:
        """Whether something is kept between steps that a rank without step() would not have."""

    @abstractmethod
    def compress(self, work: Work) -> None:
        """Moves gradients into what is kept and into v, and selects and packs the largest entries of v."""

    def brought(self) -> dict[Tensor, dict[str, Tensor]]:
        """Returns what a dense run left in the optimizer's state, by parameter and kind, and forgets it."""
        return {}

    @property
    def steps_taken(self) -> int:
        """How many steps the optimizer has taken, where it counts them; read from its state."""
        counts = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        return int(max(map(float, counts), default=0))


class DGCOptimizer(Optimizer):
    """An optimizer that applies what a DGCState has reduced."""

    # Weak, or a DGCState that is dropped keeps its memory until the garbage collector comes. Of the class too, so that
    # a copy without a DGCState says what is missing.
    _attached: tuple[weakref.ref[Reducer], ...] = ()

    def rule(self) -> Rule:
        """Returns what it keeps of gradients before they are sent."""
        raise NotImplementedError

    def attach(self, reducer: Reducer) -> None:
        """Names the DGCState that reduces the gradients, without keeping it alive; DGCState calls this itself."""
        self._attached = (*(one for one in self._attached if one() is not None), weakref.ref(reducer))

    @property
    def reducer(self) -> Reducer | None:
        """The DGCState that reduces the gradients: the last one that was made and is not gone; None without one."""
        return next((reducer for one in reversed(self._attached) if (reducer := one()) is not None), None)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Answers GradScaler.step(), which alone asks: no, it has to unscale the gradients itself.

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
