"""Local steps on real links of 10 Mbit/s to 1 Gbit/s, against an exchange at every step, dense and by DGC.

    sudo python -m benchmarks.training.local_network

Ranks, links and clocks are those of network.py: each rank is a process of one thread in a network namespace of its
own, and an island. All have torch.optim.AdamW; dgc.AdamW where DGC exchanges at every step. Competitors take turns: H
steps of one that exchanges every H, one step of the others, which at 10 Mbit/s take long enough. A time is the slowest
rank's, divided by the steps. Bytes are those of Ethernet frames that leave a rank, counted by the kernel.

- `alone`: no exchange at all, the limit.
- `ddp`: plain DDP, float32.          `dgc`: this package at 1 %, 8 bits a value, at every step.
- `DiLoCo`: dgc.LocalSteps at density 1 with dgc.OuterSGD.     `3 %`, `1 %`: dgc.LocalSteps, 8 bits a value.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from benchmarks import harness

from .links import namespaces
from .links.meter import counted, limit_of, reached, slowest, timed
from .links.ranks import finish, spawned
from .network import task

NAMES = ("alone", "ddp", "dgc", "DiLoCo", "3 %", "1 %")
ROUNDS = {"DiLoCo": 1.0, "3 %": 0.03, "1 %": 0.01}
"""Density of those that exchange after H steps."""
RATES = ("10mbit", "100mbit", "1gbit")
LR = 1e-3


@dataclass(frozen=True)
class Competitor:
    """What takes some steps at a time."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module], Tensor]
    steps: int
    """Of one call."""
    kept: object
    """What exchanges."""

    def __call__(self) -> None:
        """Takes the steps."""
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            self.loss(self.model).backward()
            self.optimizer.step()


def competitor(name: str, net: nn.Module, loss: Callable[[nn.Module], Tensor], every: int) -> Competitor:
    """Returns a competitor that trains this network, equal on all ranks."""
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if name in ("ddp", "dgc") else net
    optimizer: torch.optim.Optimizer
    kept: object = None
    if name == "dgc":
        optimizer = dgc.AdamW(model.parameters(), lr=LR)
        kept = dgc.attach(model, optimizer, dgc.DGCConfig(density=0.01, wire_dtype="8bit"))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    if name in ROUNDS:
        diloco = name == "DiLoCo"
        config = dgc.DGCConfig(
            ROUNDS[name],
            residual_decay=1.0 if diloco else 0.95,
            wire_dtype=torch.float32 if diloco else "8bit",
        )
        outer = partial(dgc.OuterSGD, lr=0.7, momentum=0.9) if diloco else partial(dgc.SGD, lr=1.0)
        kept = dgc.LocalSteps(model, optimizer, config, every=every, outer=outer)
    return Competitor(name, model, optimizer, loss, every if name in ROUNDS else 1, kept)


def worker(rank: int, args: argparse.Namespace, limited: bool, folder: str) -> None:
    """Measures all rates on one rank."""
    torch.set_num_threads(1)
    link = namespaces.Link(rank) if limited else None
    dist.init_process_group(
        "gloo", rank=rank, world_size=args.ranks, store=dist.FileStore(f"{folder}/store", args.ranks)
    )
    generator = torch.Generator().manual_seed(rank)
    competitors = [competitor(name, *task(args.model, generator), args.every) for name in NAMES]
    for c in competitors:
        for _ in range(3):  # DDP builds its buckets again after the first step
            c()
    parameters = sum(p.numel() for p in competitors[0].model.parameters())
    result: dict[str, Any] = {"parameters": parameters, "bytes": {}, "rates": {}, "reached": {}}
    for rate in args.rates if limited else ["unlimited"]:
        if link:
            link.limit(limit_of(rate), args.latency)
            dist.barrier()
            result["bytes"] = result["bytes"] or {c.name: counted(link, c, args.ranks) / c.steps for c in competitors}
            result["reached"][rate] = reached(link, rate)
        times = [[timed(c) / c.steps for c in competitors] for _ in range(args.repeats + 1)][1:]
        flat = slowest([seconds for row in times for seconds in row])
        result["rates"][rate] = {c.name: flat[i :: len(competitors)] for i, c in enumerate(competitors)}
    finish(result, folder)


def tables(result: dict[str, Any], args: argparse.Namespace) -> list[harness.Table]:
    """Returns the times, and the bytes where they were counted."""
    what = f"{args.model}, {result['parameters'] / 1e6:.1f}M parameters, {args.ranks} ranks, H = {args.every}"
    rows = []
    for rate, seconds in result["rates"].items():
        alone = statistics.median(seconds["alone"])
        ratios = [harness.shown(*harness.ratio(seconds, name, "alone")) for name in NAMES[1:]]
        link = f"{result['reached'][rate]:,.1f}" if rate in result["reached"] else "no limit"
        rows.append([rate, link, f"{1e3 * alone:.0f}", *ratios])
    latency = f"latency {args.latency:g} ms" if args.latency else "no latency set"
    title = (
        f"{what}: time of a step / time of a step without exchange, median (lowest to highest) of {args.repeats}; "
        f"{latency}. Link: Mbit/s of frames that a rank reaches in a plain all-reduce."
    )
    found: list[harness.Table] = [(title, ["rate", "link", "alone, ms", *NAMES[1:]], rows)]
    if result["bytes"]:
        ddp = result["bytes"]["ddp"]
        row = [f"{result['bytes'][name]:,.0f} ({ddp / result['bytes'][name]:,.0f}x)" for name in NAMES[1:]]
        found.append(("Bytes that leave a rank in a step, counted by the kernel (DDP's over it).", NAMES[1:], [row]))
    return found


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="of each direction, as tc writes them")
    parser.add_argument("--ranks", type=int, default=2, help="islands of one rank each")
    parser.add_argument("--model", default="gpt", help="gpt, mlp, resnet, lstm or tiny")
    parser.add_argument("--every", type=int, default=15, help="H")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each competitor")
    parser.add_argument("--latency", type=float, default=0, help="ms in each direction; needs netem in the kernel")
    parser.add_argument("--out", type=harness.result_name, help="name under results/; without it nothing is written")
    args = parser.parse_args()
    if args.repeats < 1 or args.every < 1 or not all(math.isfinite(namespaces.bits(rate)) for rate in args.rates):
        parser.error("--repeats, --every: expected numbers >= 1")
    if missing := namespaces.missing():
        print(f"NO LIMITS: {missing}. All runs on an unlimited loopback; limits need root.", file=sys.stderr)
    elif args.latency and not namespaces.has_netem():
        sys.exit("--latency: this kernel has no netem (CONFIG_NET_SCH_NETEM)")
    harness.keep_freed_memory()
    result = measured(args, limited=not missing)
    (title, headers, rows), *more = tables(result, args)
    harness.report(args.out, title, headers, rows, {"limited": not missing, **result}, more)


def measured(args: argparse.Namespace, limited: bool) -> dict[str, Any]:
    """Returns what `worker` measures, from ranks that live no longer than this call."""
    result: dict[str, Any] = spawned(worker, args.ranks, limited, args, limited)
    return result


if __name__ == "__main__":
    main()
