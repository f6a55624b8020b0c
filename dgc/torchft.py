"""The adapter for torchft: an OptimizerWrapper under which a step that is not committed loses nothing.

optimizer = dgc.torchft.OptimizerWrapper(manager, torch.optim.AdamW(model.parameters()))
dgc.attach(model, optimizer, config)
"""

from __future__ import annotations

from torchft import optim

from .needs import needs
from .state import DGCState

needs("0.2", "torchft")


class OptimizerWrapper(optim.OptimizerWrapper):
    """torchft's OptimizerWrapper, which gives back to the residual what was sent for a step that is not committed.

    torchft's own leaves such a step out by not calling the optimizer's step(). What DGC has sent by then would be in
    neither the residual nor the model. All ranks among which DGC exchanges have to decide alike, since a payload of
    another step is an error.
    """

    def step(self, closure: object = None) -> None:
        """Takes the step if the manager commits it; else the gradient stays in momentum and residual, for later steps.

        Raises:
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("OptimizerWrapper.step: expected no closure, which torchft does not support, got one")
        state = getattr(self.optim, "dgc", None)
        if self.manager.should_commit():
            self.optim.step()
        elif isinstance(state, DGCState):
            state.discard(drop_gradient=False)
