"""Trains a network by Hugging Face Accelerate, with gradient accumulation, clipping and a checkpoint.

    torchrun --standalone --nproc-per-node 2 examples/accelerate_mlp.py
    torchrun --standalone --nproc-per-node 2 examples/accelerate_mlp.py --resume

The data are made up, classes of random points. The second line goes on from the checkpoint of the first, and has the
residual of all ranks.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dgc
import dgc.accelerate


def main() -> None:
    """Trains on this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/accelerate", help="folder of the checkpoint (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in it")
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    args = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    config = dgc.DGCConfig(density=0.01, warmup_steps=30, clip_norm=1.0)  # in place of accelerator.clip_grad_norm_
    dgc.accelerate.attach(accelerator, model, optimizer, config)
    if args.resume:
        accelerator.load_state(args.folder)

    for epoch in range(args.epochs):
        for points, classes in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(points), classes)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
    accelerator.save_state(args.folder)
    accelerator.print(f"step {optimizer.dgc.step}, compressed {optimizer.dgc.stats.compression_ratio:.0f}x")
    accelerator.end_training()


if __name__ == "__main__":
    main()
