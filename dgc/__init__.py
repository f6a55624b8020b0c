"""Deep Gradient Compression for PyTorch (Lin et al., ICLR 2018).

Three lines go in front of an unchanged training loop, with dgc.SGD, or dgc.AdamW with torch.optim.AdamW's arguments:

    optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.001, warmup_steps=2000))
    state.register(model)

Or one: optimizer = dgc.attach(model, optimizer), which also takes torch.optim.SGD and AdamW, and models without DDP.
Or, where even an exchange at every step is too much: dgc.LocalSteps(model, optimizer, every=15).
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .attach import attach
from .config import DGCConfig
from .ddp import dgc_hook
from .local_steps import LocalSteps
from .ops import PayloadError, backend
from .optim import SGD, Adam, AdamW, OuterSGD
from .state import DGCState
from .stats import Stats

if TYPE_CHECKING:
    from . import checkpoint

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "DGCConfig",
    "DGCState",
    "LocalSteps",
    "OuterSGD",
    "PayloadError",
    "Stats",
    "__version__",
    "attach",
    "backend",
    "checkpoint",
    "dgc_hook",
]


def __getattr__(name: str) -> Any:
    """Imports dgc.checkpoint at its first use, since its import takes half as long as that of all the rest."""
    if name == "checkpoint":
        from importlib import import_module

        return import_module(".checkpoint", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
