"""DGCState in elastic Horovod: hvd.elastic.TorchState(model=model, optimizer=optimizer, dgc=optimizer.dgc_state)."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from horovod.torch.elastic.state import (
    OptimizerStateHandler,
    StateHandler,
    get_handler_registry,
    set_handler_registry,
)
from horovod.torch.functions import broadcast_optimizer_state

from .state import DGCState

_handled: weakref.WeakSet[DGCState] = weakref.WeakSet()
"""States that a handler commits and restores."""


class Compressed:
    """An optimizer that DistributedOptimizer has made."""

    dgc_state: DGCState


class DGCStateHandler(StateHandler):
    """Commits, restores and synchronises a DGCState.

    Momentum and residual are each worker's own: commit and restore concern this worker alone, and sync() broadcasts
    neither (see DGCState.regroup). A commit copies both, 8 bytes a parameter.
    """

    def __init__(self, state: DGCState) -> None:
        """Commits for the first time."""
        super().__init__(state)
        _handled.add(state)
        self.save()

    def save(self) -> None:
        """Commits.

        Raises:
            RuntimeError: between backward() and step().
        """
        self._saved = copy.deepcopy(self.value.state_dict())
        self._joined = self.value.joined

    def restore(self) -> None:
        """Restores the last commit, and forgets a step that broke off."""
        self.value.restore(self._saved, self._joined)

    def sync(self) -> None:
        """Takes momentum and residual over into the group of present workers; a collective."""
        # First, since momentum factors are compared, and a newcomer's are not yet those of the schedule.
        broadcast_optimizer_state(self.value.optimizer, root_rank=0)
        self.value.regroup()


class CompressedHandler(OptimizerStateHandler):
    """Horovod's handler of an optimizer, for one whose DGCState needs a handler too."""

    def __init__(self, optimizer: Any) -> None:
        """Commits for the first time.

        Raises:
            ValueError: no handler commits the DGCState.
        """
        # TorchState makes the handlers of model and optimizer last.
        if optimizer.dgc_state not in _handled:
            raise ValueError(
                "hvd.elastic.TorchState: expected the optimizer's momentum and residual beside it, got none, so a "
                "restore would leave them behind: TorchState(model=model, optimizer=optimizer, dgc=optimizer.dgc_state)"
            )
        super().__init__(optimizer)


def register() -> None:
    """Registers the handlers of DGCState, and of optimizers that have one, with hvd.elastic.TorchState."""
    registry = get_handler_registry()
    if all(kind is not DGCState for kind, _ in registry):
        # TorchState takes the first handler that fits, and Horovod's own would fit our optimizers too.
        set_handler_registry([(DGCState, DGCStateHandler), (Compressed, CompressedHandler), *registry])
