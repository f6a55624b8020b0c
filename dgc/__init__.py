"""Deep Gradient Compression for PyTorch (Lin et al., ICLR 2018): three lines in front of an unchanged training loop.

optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.001, warmup_steps=2000))
model.register_comm_hook(state, dgc.dgc_hook)
"""

__version__ = "0.1.0"

from .config import DGCConfig
from .ddp import dgc_hook
from .ops import backend
from .optim import SGD
from .state import DGCState
from .stats import Stats
from .wire import PayloadError

__all__ = ["SGD", "DGCConfig", "DGCState", "PayloadError", "Stats", "__version__", "backend", "dgc_hook"]
