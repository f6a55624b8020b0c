"""Trains a network by Lightning's Trainer, with gradient accumulation, clipping and checkpoints.

    python examples/lightning_mlp.py --devices 2
    python examples/lightning_mlp.py --devices 2 --epochs 8 --resume

The data are made up. The second line goes on from the checkpoint of the first, and has the residual of all ranks.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dgc
from dgc.lightning import DGCCallback


class Network(LightningModule):
    """Two layers; nothing in it knows of DGC."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """Returns the loss of a batch."""
        points, classes = batch
        return nn.functional.cross_entropy(self.layers(points), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns torch's optimizer, which becomes dgc.SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Trains on this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/lightning", help="of checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in it")
    parser.add_argument("--devices", type=int, default=1, help="that Lightning starts (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    args = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    loader = DataLoader(TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1)), batch_size=32, shuffle=True)
    compress = DGCCallback(dgc.DGCConfig(density=0.01, warmup_steps=30, clip_norm=1.0))  # no gradient_clip_val
    callbacks = [compress, ModelCheckpoint(args.folder, save_last=True)]
    settings = {"strategy": "ddp", "devices": args.devices, "max_epochs": args.epochs, "logger": False}
    trainer = Trainer(**settings, accumulate_grad_batches=2, callbacks=callbacks)
    trainer.fit(Network(), loader, ckpt_path=f"{args.folder}/last.ckpt" if args.resume else None)
    trainer.print(compress.state)


if __name__ == "__main__":
    main()
