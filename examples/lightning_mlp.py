"""Trains a network by Lightning's Trainer, with gradient accumulation, clipping and checkpoints.

    python examples/lightning_mlp.py --devices 2
    python examples/lightning_mlp.py --devices 2 --epochs 8 --resume

The data are made up. The second line goes on from the first one's checkpoint. --dense leaves DGC out.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import dgc
from dgc.lightning import DGCCallback


class Network(LightningModule):
    """Two layers; nothing in it knows of DGC."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """Returns the loss of a batch."""
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns torch's optimizer, which becomes dgc.SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--folder", "runs/lightning"), ("--devices", 1), ("--epochs", 4), ("--seed", 0)):
        parser.add_argument(option, type=type(default), default=default, help="default: %(default)s")
    for option, what in (("--resume", "go on from the last checkpoint in the folder"), ("--dense", "without DGC")):
        parser.add_argument(option, action="store_true", help=what)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    x = torch.randn(8192, 64)
    data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1))
    train, test = Subset(data, range(4096)), Subset(data, range(4096, 8192))
    compress = DGCCallback(dgc.DGCConfig(density=0.01, warmup_steps=30, clip_norm=1.0))  # no gradient_clip_val
    callbacks = [ModelCheckpoint(args.folder, save_last=True), *([] if args.dense else [compress])]
    settings = {"devices": args.devices, "max_epochs": args.epochs, "accumulate_grad_batches": 2, "logger": False}
    trainer = Trainer(strategy="ddp", callbacks=callbacks, **settings)
    module, resume = Network(), f"{args.folder}/last.ckpt" if args.resume else None
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True), ckpt_path=resume)
    trainer.print(compress.state and f"{compress.state}: {compress.state.stats.bytes_sent} bytes a step")
    trainer.test(module, DataLoader(test, batch_size=4096))
