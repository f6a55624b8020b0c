"""DGCState in elastic Horovod: hvd.elastic.TorchState(model=model, optimizer=optimizer, dgc=optimizer.dgc_state)."""

from __future__ import annotations

import copy

from horovod.torch.elastic.state import StateHandler, get_handler_registry, set_handler_registry

from .horovod_exchange import HorovodExchange
from .state import DGCState


class DGCStateHandler(StateHandler):
    """Commits, restores and synchronises a DGCState.

    Momentum and residual are each worker's own: commit and restore concern this worker alone, and sync() broadcasts
    neither (see DGCState.regroup). A commit copies both, 8 bytes a parameter.
    """

    def __init__(self, state: DGCState) -> None:
        """Commits for the first time."""
        super().__init__(state)
        self.save()

    def save(self) -> None:
        """Commits.

        Raises:
            RuntimeError: between backward() and step().
        """
        self._saved = copy.deepcopy(self.value.state_dict())
        self._joined = self.value.joined

    def restore(self) -> None:
        """Returns to what was committed, and forgets a step that broke off."""
        exchange = self.value.exchange
        assert isinstance(exchange, HorovodExchange)
        exchange.roll_back(self._saved["rank"], self._saved["world_size"])
        self.value.load_state_dict(self._saved)
        self.value.joined = self._joined

    def sync(self) -> None:
        """Takes momentum and residual over into the group of workers that are there now; a collective."""
        self.value.regroup()


def register() -> None:
    """Makes hvd.elastic.TorchState know DGCState."""
    registry = get_handler_registry()
    if all(kind is not DGCState for kind, _ in registry):
        set_handler_registry([*registry, (DGCState, DGCStateHandler)])
