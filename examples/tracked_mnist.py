"""Trains the CNN of mnist.py with DGC, and writes loss and DGC's figures for TensorBoard and Weights & Biases.

    torchrun --standalone --nproc-per-node 2 examples/tracked_mnist.py --folder runs
    tensorboard --logdir runs/tensorboard

`pip install tensorboard wandb`; what is not installed is left out, with a line that says so. Weights & Biases runs
offline, without an account; `wandb sync runs/wandb/offline-run-*` uploads it. state.stats.scalars() has plain numbers
that are on the host already, so that writing them makes no GPU wait.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from digits import RECIPE, convnet, dgc_config, options, split, start_ddp, train_step
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import dgc

Write = Callable[[dict[str, float], int], None]


def writers(folder: Path) -> list[Write]:
    """Returns what takes figures by name and a step, for each tracker that is installed."""
    found: list[Write] = []
    if find_spec("tensorboard") is None:
        print("TensorBoard is left out: pip install tensorboard")
    else:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"), flush_secs=1)
        found.append(lambda figures, step: [board.add_scalar(k, v, step) for k, v in figures.items()] and board.flush())
    if find_spec("wandb") is None:
        print("Weights & Biases is left out: pip install wandb")
    else:
        import wandb

        run = wandb.init(project="dgc", dir=str(folder), mode="offline")
        found.append(lambda figures, step: run.log(figures, step=step))
    return found


def main() -> None:
    """Trains on this rank; rank 0 writes."""
    parser = options(dense=False)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the trackers' files go")
    parser.add_argument("--every", type=int, default=10, help="steps between two records")
    args, device = start_ddp(parser)
    train, test_images, test_labels = split(device)
    sampler = DistributedSampler(train, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    steps = args.epochs * len(loader)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(convnet().to(device))
    optimizer = dgc.SGD(model.parameters(), lr=args.lr, **RECIPE)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc_config(args, steps))
    state.register(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    args.folder.mkdir(parents=True, exist_ok=True)
    write = writers(args.folder) if dist.get_rank() == 0 else []

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = train_step(model, optimizer, scheduler, x.to(device), y.to(device))
            if state.step % args.every == 0:
                figures = {f"dgc/{name}": value for name, value in state.stats.scalars().items()}
                for one in write:
                    one({"loss": loss, **figures}, state.step)
    if dist.get_rank() == 0:
        with torch.no_grad():
            right = (model.module(test_images).argmax(1) == test_labels).double().mean().item()
        print(f"test accuracy {100 * right:.1f} %, {state.stats.total_bytes_sent:,} bytes sent, {len(write)} trackers")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
