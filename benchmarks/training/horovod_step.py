"""A whole training step under Horovod with nothing to wait for on the network: what compression costs, and sends.

    python -m benchmarks.training.horovod_step

The sister of step.py: it starts two processes of one thread itself, with gloo on the loopback, which train the same
MLP. Competitors take turns, step by step: `no exchange`, without Horovod, and torch.optim.SGD(momentum=0.9), the limit;
`horovod`, hvd.DistributedOptimizer around that; `horovod fp16`, with Horovod's own 16-bit compression; `dgc`, this
package at 0.1 %. A step is zero_grad, forward, backward and step; its time is the slower rank's.

Horovod's settings are its defaults. Here a rival gains from HOROVOD_FUSION_THRESHOLD=0 in front of the command: the
weights are then not copied together first.

Then it counts bytes, on Linux: what dgc should send, what its stats say, and what went over the loopback, where every
program of the machine is counted. As root, the loopback can be its own:

    unshare -n -m sh -c 'mount -t sysfs sysfs /sys; ip link set lo up; exec python -m benchmarks.training.horovod_step'
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod
import horovod.torch as hvd
import torch
from torch import nn
from tqdm import tqdm

import dgc
import dgc.horovod
from benchmarks.harness import ROOT, report, shown

from .step import BATCH, LAYERS, WIDTH, mlp

NAMES = ("no exchange", "dgc", "horovod", "horovod fp16")
DENSITY = 0.001
BLOCK = 20  # steps between two readings of the loopback's counter
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")


def competitor(name: str) -> tuple[Callable[[], None], Any]:
    """Returns one training step of a competitor, on a model of its own, and its optimizer."""
    model = mlp()
    # Horovod tells collectives apart by parameters' names.
    named = [(f"{name}.{n}", p) for n, p in model.named_parameters()]
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if name == "dgc":
        optimizer = dgc.SGD(model.parameters(), lr=0.01, momentum=0.9)
        compressor = dgc.horovod.DGCCompressor(dgc.DGCConfig(density=DENSITY))
        optimizer = dgc.horovod.DistributedOptimizer(optimizer, named, compression=compressor)
    elif name != "no exchange":
        compression = hvd.Compression.fp16 if name == "horovod fp16" else hvd.Compression.none
        optimizer = hvd.DistributedOptimizer(optimizer, named, compression=compression)
    generator = torch.Generator().manual_seed(hvd.rank())
    x, y = (torch.randn(BATCH, WIDTH, generator=generator) for _ in range(2))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    return step, optimizer


def on_loopback(run: Callable[[], object]) -> float:
    """Returns how many bytes a step and rank went over the loopback while all ranks ran a block of steps."""
    hvd.barrier()
    before = int(SENT.read_text())
    hvd.barrier()
    for _ in range(BLOCK):
        run()
    hvd.barrier()
    sent = int(SENT.read_text()) - before
    hvd.barrier()
    return sent / BLOCK / int(hvd.size())


def worker(runs: int, steps: int) -> dict[str, Any]:
    """Times all competitors on one rank, then counts their bytes."""
    for setting in ("HOROVOD_CYCLE_TIME", "HOROVOD_CACHE_CAPACITY"):
        # horovod.run() of 0.28.1 sets them to "(None,)", which Horovod reads as 0; horovodrun leaves the defaults.
        os.environ.pop(setting, None)
    hvd.init()
    torch.set_num_threads(1)
    competitors = {name: competitor(name) for name in NAMES}
    seconds = torch.zeros(runs, len(NAMES), steps)
    sent: dict[str, list[float]] = {}
    total = runs * (steps + SENT.exists())
    with tqdm(total=total, desc="rounds", file=sys.stderr, disable=hvd.rank() != 0) as bar:
        for run in range(runs):
            for index in range(-2, steps):  # two steps warm up
                for i, name in enumerate(NAMES):
                    hvd.barrier()
                    begin = time.perf_counter()
                    competitors[name][0]()
                    if index >= 0:
                        seconds[run, i, index] = time.perf_counter() - begin
                if index >= 0:
                    bar.update()
        pause = float(seconds[:, NAMES.index("dgc")].median())
        blocks = {name: competitors[name][0] for name in ("dgc", "horovod")}
        # Horovod's threads agree once a cycle, whether there is work or not.
        blocks |= {"a barrier": hvd.barrier, "asleep for a dgc step": lambda: time.sleep(pause)}
        for _ in range(runs if SENT.exists() else 0):
            for name, block in blocks.items():
                sent.setdefault(name, []).append(on_loopback(block))
            bar.update()
    stats = competitors["dgc"][1].dgc_state.stats.bytes_sent
    return {"seconds": hvd.allreduce(seconds, op=hvd.Max), "sent": sent, "stats": stats}


def formula(name: str, ranks: int) -> int:
    """Returns the bytes of tensors that a rank has to send at a step.

    dgc's payload, docs/wire.md, goes to all others: a header with a byte for each parameter; the indices of the k sent
    entries, low bits of each and the rest in unary; a 32-bit value for each; each part padded to 16 bytes. Here each
    weight has a payload of its own. What is not compressed goes round a ring, twice.
    """
    weight, bias = WIDTH * WIDTH, WIDTH
    if name != "dgc":
        return 2 * (ranks - 1) * LAYERS * (weight + bias) * (2 if name == "horovod fp16" else 4) // ranks
    k = math.ceil(DENSITY * weight)
    low = int(math.log2(weight // k))
    upper, lower = (4 * -(-bits // 32) for bits in (k + (weight - 1 >> low), k * low))
    payload = sum(-(-n // 16) * 16 for n in (32 + 1, upper, lower, 4 * k))
    return (ranks - 1) * LAYERS * payload + 2 * (ranks - 1) * LAYERS * bias * 4 // ranks


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each competitor in a run")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    # Processes get `worker` itself, but import what it uses.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    measured = horovod.run(worker, (args.runs, args.steps), num_proc=args.processes, use_gloo=True)[0]

    medians = measured["seconds"].median(dim=2).values  # [runs, competitors]
    raw = {name: medians[:, i].tolist() for i, name in enumerate(NAMES)}
    rows = []
    for i, name in enumerate(NAMES):
        ratios = (medians[:, i] / medians[:, 0]).tolist()
        rows.append([name, shown(statistics.median(ratios), min(ratios), max(ratios))])
    bytes_rows = []
    for name, sent in measured["sent"].items():
        expected = f"{formula(name, args.processes):,}" if name in NAMES else "-"
        stats = f"{measured['stats']:,}" if name == "dgc" else "-"
        counted = f"{statistics.median(sent):,.0f} ({min(sent):,.0f} to {max(sent):,.0f})"
        bytes_rows.append([name, expected, stats, counted])
    report(
        "horovod_step_cpu",
        f"Step of a 12.6M-parameter MLP, batch {BATCH}, {args.processes} processes of 1 thread, Horovod "
        f"{horovod.__version__} with gloo, loopback without limit: time against no exchange, median of {args.runs} "
        f"runs (lowest to highest), each the median of {args.steps} steps.",
        ["competitor", "time / no exchange"],
        rows,
        {"seconds": raw, "bytes": {"stats": measured["stats"], "loopback": measured["sent"]}},
        more=[
            (
                f"Bytes a step and rank. Loopback: with TCP's headers and Horovod's own messages, median of "
                f"{args.runs} blocks of {BLOCK} steps (lowest to highest).",
                ["", "formula", "stats.bytes_sent", "loopback"],
                bytes_rows,
            )
        ],
    )


if __name__ == "__main__":
    main()
