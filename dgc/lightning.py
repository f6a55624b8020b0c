"""The adapter for Lightning's Trainer: DGCCallback.

    trainer = Trainer(strategy="ddp", callbacks=[dgc.lightning.DGCCallback(dgc.DGCConfig(density=0.01))])

Lightning's own ddp_comm_hook would not do: it is registered before there are optimizers, and on a GPU only.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .attach import attach
from .config import DGCConfig
from .needs import needs
from .state import DGCState

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:  # the same under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer

needs("2.6", "lightning", "pytorch-lightning")
_logger = logging.getLogger("dgc")


class DGCCallback(Callback):
    """Compresses the exchange of gradients of a module with one optimizer under DDPStrategy.

    Momentum and residual of all ranks go into the Trainer's checkpoint. Rank 0 writes it, and holds them for that time.
    fit(ckpt_path=...) takes them up, also on another number of ranks. A checkpoint of a dense run goes on with DGC.

    Args:
        config: the same on all ranks; None for DGCConfig().
        mesh: as DGCState's: nodes as workers. "auto": nodes of the Trainer's `devices`.
    """

    def __init__(self, config: DGCConfig | None = None, *, mesh: DeviceMesh | Literal["auto"] | None = None) -> None:
        """Keeps the arguments for fit()."""
        self._config, self._mesh = config, mesh
        self._loaded: dict[str, Any] = {}
        self.state: DGCState | None = None
        """The DGCState of the last fit()."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches DGC, since model and optimizer are ready, and the optimizer's state is not loaded yet.

        Raises:
            TypeError: the strategy does not wrap the module in DistributedDataParallel.
            ValueError: there are several optimizers, or the Trainer clips; or as dgc.attach.
        """
        if trainer.world_size > 1 and not isinstance(trainer.model, DistributedDataParallel):
            raise TypeError(
                f"strategy: expected DDPStrategy, got {type(trainer.strategy).__name__}, whose gradients do not come "
                'to DGC. Write Trainer(strategy="ddp")'
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"configure_optimizers: expected one optimizer, got {len(trainer.optimizers)}. Give one optimizer "
                "several parameter groups, or write the loop without the Trainer: dgc.attach for each"
            )
        if trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val: expected None, got {trainer.gradient_clip_val}. It would cut what the exchange "
                "has brought, sums of many steps. Leave it out, and write DGCConfig(clip_norm=...), which clips each "
                "rank's gradient before"
            )
        (optimizer,) = trainer.optimizers
        attach(trainer.model, optimizer, self._config, mesh=self._nodes(trainer), grad_scaler=trainer.scaler)
        self.state = optimizer.dgc

    def _nodes(self, trainer: Trainer) -> DeviceMesh | Any:
        if self._mesh != "auto":
            return self._mesh  # attach() refuses other words
        shape = trainer.num_nodes, trainer.num_devices
        if 1 in shape:
            if trainer.is_global_zero:
                _logger.info('dgc: mesh="auto" finds %d x %d devices: each rank is a worker of its own', *shape)
            return None
        return init_device_mesh(trainer.strategy.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up what a checkpoint has brought."""
        loaded, self._loaded = self._loaded, {}
        if loaded and self.state is not None:
            self.state.load_state_dict(loaded)

    def state_dict(self) -> dict[str, Any]:
        """Returns the residual of all ranks on rank 0, and {} elsewhere; a collective, as save_checkpoint() is."""
        return {} if self.state is None else self.state.full_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the loaded residual until training starts, since the Trainer calls this before the model is ready."""
        self._loaded = state_dict
