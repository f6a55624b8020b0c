"""The adapter for the Trainer of Hugging Face transformers: attach() before train().

    dgc.transformers.attach(trainer, dgc.DGCConfig(density=0.01))
    trainer.train()

A callback of its own would not do: the Trainer tells it neither the DistributedDataParallel module nor the checkpoint.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch.distributed.device_mesh import DeviceMesh
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from . import accelerate, checkpoint
from .config import DGCConfig
from .needs import needs
from .state import DGCState

needs("5.24", "transformers")

_logger = logging.getLogger("dgc")
# The folder in a checkpoint with the residual of all ranks; trainer_state.json says by it that there is one.
_FOLDER = "dgc"


def attach(
    trainer: Trainer, config: DGCConfig | None = None, *, mesh: DeviceMesh | Literal["auto"] | None = None
) -> None:
    """Has a Trainer compress the exchange of gradients; before train(), on all ranks.

    train() makes model and optimizer ready, and the DGCState: `trainer.optimizer.dgc`. max_grad_norm of the
    TrainingArguments goes to DGCConfig.clip_norm, unless that is set, and becomes 0, since the Trainer would clip after
    the exchange. Each checkpoint gets a folder `dgc` with the residual of all ranks, on a file system that all of them
    share, and train(resume_from_checkpoint=...) takes it up. A checkpoint of a dense run goes on with DGC.

    Args:
        trainer: under torchrun, without DeepSpeed, FSDP and auto_find_batch_size.
        config: the same on all ranks; None for DGCConfig().
        mesh: as DGCState's: nodes as workers.

    Raises:
        ValueError: it is attached already, or has settings that DGC cannot honour.
    """
    if any(isinstance(callback, _Callback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("trainer: expected one that is not attached, got one that is: call attach() once")
    args, config = trainer.args, config or DGCConfig()
    if args.n_gpu > 1 or args.auto_find_batch_size:
        raise ValueError(
            f"trainer: expected one GPU a process and no auto_find_batch_size, got {args.n_gpu} GPUs and "
            f"auto_find_batch_size={args.auto_find_batch_size}. Start with torchrun, and choose the batch size yourself"
        )
    if args.max_grad_norm:
        config = replace(config, clip_norm=config.clip_norm or float(args.max_grad_norm))
        _logger.info(
            "dgc: clip_norm=%g, and max_grad_norm, which was %g, is 0: the Trainer would clip after the exchange",
            config.clip_norm,
            args.max_grad_norm,
        )
        args.max_grad_norm = 0.0
    trainer.add_callback(_Callback(trainer, config, mesh))


class _Callback(TrainerCallback):
    def __init__(self, trainer: Trainer, config: DGCConfig, mesh: DeviceMesh | Literal["auto"] | None) -> None:
        self._trainer, self._config, self._mesh = trainer, config, mesh
        self._resume: str | bool | None = None
        train = trainer.train

        @functools.wraps(train)
        def noting(resume_from_checkpoint: str | bool | None = None, *more: Any, **kwargs: Any) -> Any:
            self._resume = resume_from_checkpoint
            return train(resume_from_checkpoint, *more, **kwargs)

        trainer.train = noting

    @property
    def _state(self) -> DGCState:
        state: DGCState = self._trainer.optimizer.dgc
        return state

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        accelerate.attach(trainer.accelerator, trainer.model_wrapped, trainer.optimizer, self._config, mesh=self._mesh)
        resume = get_last_checkpoint(args.output_dir) if self._resume is True else self._resume
        if resume and _FOLDER in state.stateful_callbacks:
            checkpoint.load(self._state, Path(resume) / _FOLDER)
        state.stateful_callbacks.pop(_FOLDER, None)
        if not args.save_only_model:
            state.stateful_callbacks[_FOLDER] = {"args": {}, "attributes": {}}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.save_only_model:
            checkpoint.save(self._state, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER)
