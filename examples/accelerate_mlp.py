"""Trains a network by Hugging Face Accelerate, with gradient accumulation, clipping and a checkpoint.

    torchrun --standalone --nproc-per-node 2 examples/accelerate_mlp.py
    torchrun --standalone --nproc-per-node 2 examples/accelerate_mlp.py --resume

The data are made up. The second line goes on from the checkpoint of the first, with the residual of all ranks. --dense
leaves DGC out.
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
    parser.add_argument("--folder", default="runs/accelerate", help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in it")
    for option, default in (("--epochs", 4), ("--seed", 0)):
        parser.add_argument(option, type=int, default=default, help="default: %(default)s")
    parser.add_argument("--dense", action="store_true", help="without DGC")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    x = torch.randn(8192, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(x[:4096], y[:4096]), batch_size=32, shuffle=True)

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    config = dgc.DGCConfig(density=0.01, warmup_steps=30, clip_norm=1.0)  # in place of accelerator.clip_grad_norm_
    if not args.dense:
        dgc.accelerate.attach(accelerator, model, optimizer, config)
    if args.resume:
        accelerator.load_state(args.folder)

    for _ in range(args.epochs):
        for points, classes in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(points), classes))
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(args.folder)
    x, y = x[4096:].to(accelerator.device), y[4096:].to(accelerator.device)
    sent = "" if args.dense else f", step {optimizer.dgc.step}, {optimizer.dgc.stats.bytes_sent} bytes a step"
    accelerator.print(f"test loss {nn.functional.cross_entropy(model(x), y).item():.4f}{sent}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
