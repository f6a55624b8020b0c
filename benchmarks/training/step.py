"""A whole training step under DDP with nothing to wait for on the network: what compression costs.

    python -m benchmarks.training.step

Two processes of one thread on the loopback train a 12.6M-parameter MLP at batch 64. Competitors take turns, step by
step: `no_sync`, no exchange at all and torch.optim.SGD(momentum=0.9), the limit; `ddp`, plain DDP with the same
optimizer; `ddp fp16`, with PyTorch's fp16_compress_hook; `dgc`, this package at 0.1 % (competitors.py); and with AdamW
`no_sync adamw`, torch.optim.AdamW(fused=True) without exchange, and `dgc adamw`. The optimizer's step is part of the
time; a step's time is the slower rank's. The allocator has the settings of launch/torchrun.sh.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from benchmarks import architectures
from benchmarks.harness import keep_freed_memory, report, shown

from .competitors import competitor

WIDTH, LAYERS, BATCH = 2048, 3, 64


def mlp() -> nn.Sequential:
    """Returns 12,589,056 parameters."""
    torch.manual_seed(0)
    return architectures.mlp(*[WIDTH] * (LAYERS + 1))


NAMES = ("no_sync", "dgc", "ddp", "ddp fp16", "no_sync adamw", "dgc adamw")
LIMITS = {name: "no_sync adamw" if name.endswith("adamw") else "no_sync" for name in NAMES}
"""The competitor without exchange that has the same optimizer."""


def worker(rank: int, world_size: int, folder: str, runs: int, steps: int, options: dict[str, bool]) -> None:
    """Times all competitors on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, store=dist.FileStore(f"{folder}/store", world_size)
    )
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(BATCH, WIDTH, generator=generator) for _ in range(2))
    competitors = {name: competitor(name, mlp(), lambda model: mse_loss(model(x), y), **options) for name in NAMES}
    seconds = torch.zeros(runs, len(NAMES), steps)
    with tqdm(total=runs * steps, desc="steps", file=sys.stderr, disable=rank != 0) as bar:
        for run in range(runs):
            for step in range(-2, steps):  # two steps warm up
                for i, name in enumerate(NAMES):
                    dist.barrier()
                    begin = time.perf_counter()
                    competitors[name].step()
                    if step >= 0:
                        seconds[run, i, step] = time.perf_counter() - begin
                if step >= 0:
                    bar.update()
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save(seconds, f"{folder}/seconds.pt")
    dist.destroy_process_group()


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each competitor in a run")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    rows, raw = [], {}
    for label, options in (("default", {}), ("gradient_as_bucket_view=True", {"gradient_as_bucket_view": True})):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (args.processes, folder, args.runs, args.steps, options), nprocs=args.processes)
            seconds: Tensor = torch.load(Path(folder) / "seconds.pt")
        medians = seconds.median(dim=2).values  # [runs, competitors]
        raw[label] = {name: medians[:, i].tolist() for i, name in enumerate(NAMES)}
        for i, name in enumerate(NAMES):
            limit = LIMITS[name]
            ratios = (medians[:, i] / medians[:, NAMES.index(limit)]).tolist()
            rows.append([label, name, limit, shown(statistics.median(ratios), min(ratios), max(ratios))])
    report(
        "step_cpu",
        f"DDP step of a 12.6M-parameter MLP, batch {BATCH}, {args.processes} gloo processes of 1 thread, loopback "
        f"without limit: time against a step without exchange and with the same kind of optimizer, median of "
        f"{args.runs} runs (lowest to highest), each the median of {args.steps} steps.",
        ["DDP options", "competitor", "limit", "time / limit"],
        rows,
        {"seconds": raw},
    )


if __name__ == "__main__":
    main()
