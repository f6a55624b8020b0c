"""Whether `python -m dgc plan` is right: what it predicts from its own measurements against steps taken at once after.

    sudo python -m benchmarks.cluster.plan_check

The models, the rates, the ranks and the links are those of benchmarks/training/network.py. In each setting plan
measures first, in less than 30 seconds, as on a user's machines; then DDP, DDP with fp16_compress_hook and dgc at 1 %
and 0.1 % train, in turns of several steps each. A step begins with a barrier that is not in its time, and its time is
the slowest rank's. The last settings have nodes of two ranks that share a limited link, where nodes are the workers of
one more dgc at 0.1 %.

Only the run of all settings writes results/plan_check.{md,json}; others write with --out NAME.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from benchmarks.harness import keep_freed_memory, report, result_name
from benchmarks.training.competitors import Competitor, competitor
from benchmarks.training.links import namespaces
from benchmarks.training.links.meter import limit_of, slowest, timed
from benchmarks.training.network import MODELS, RANKS, RATES, task
from benchmarks.training.node_competitors import competitor_in_nodes
from dgc.cli.forecast import Forecast, recommended
from dgc.cli.measuring import Setting, measure
from dgc.cli.models import Model

NODES, NODE_RATES, NODE_MODELS = (2, 2), ("1gbit", "100mbit"), ("mlp", "gpt")
"""Nodes and their ranks, and in which settings."""
FEWEST, MOST, PASSES = 2, 10, 2
"""Timed steps of a competitor in a turn, and turns."""
WITHIN, MEDIAN, PATIENCE = 0.2, 0.08, 30.0
"""What is aimed at: errors of all, their median, and seconds of measuring."""
NAMES = {
    "dense, float32": "ddp",
    "dense, 16 bits": "ddp fp16",
    "dgc 1 %": "dgc 1 %",
    "dgc 0.1 %": "dgc",
    "dgc 0.1 %, nodes": "dgc nodes",
}
"""Of the forecasts that are checked: what trains so."""


def competitors(model: str, places: int) -> dict[str, Competitor]:
    """Returns what trains, by the name of its forecast, each with a model of its own; a collective."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = {}
    for forecast, name in NAMES.items():
        made = task(model, generator)
        if name == "dgc nodes":
            if places > 1:
                shape = (dist.get_world_size() // places, places)
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
                found[forecast] = competitor_in_nodes(name, *made, mesh)
        else:
            density = 0.01 if name == "dgc 1 %" else 0.001
            kind = "dgc" if name == "dgc 1 %" else name
            found[forecast] = competitor(kind, *made, density=density, gradient_as_bucket_view=True)
    return found


def steps_of(one: Competitor, seconds: float) -> list[float]:
    """Returns the seconds of each timed step, of the slowest rank; a collective."""
    for _ in range(2):
        [estimate] = slowest([timed(one.step)])
    count = min(max(int(seconds / estimate), FEWEST), MOST)
    return slowest([timed(one.step) for _ in range(count)])


def busy() -> float:
    """Returns the seconds that all processors together have worked since the machine started."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def others(began: tuple[float, float, float]) -> float:
    """Returns how many processors other processes have kept busy since (busy(), own, clock) were read; a collective.

    The kernel's work for our own network is among it.
    """
    own = torch.tensor(time.process_time() - began[1], dtype=torch.float64)
    dist.all_reduce(own)
    return (busy() - began[0] - own.item()) / (time.monotonic() - began[2])


def worker(rank: int, ranks: int, places: int, model: str, rates: Sequence[str], seconds: float, folder: str) -> None:
    """Predicts and measures at all rates on one rank, whose node has so many places."""
    torch.set_num_threads(1)
    link = namespaces.Link(rank) if places == 1 else namespaces.node_link(*divmod(rank, places), folder)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(f"{folder}/store", ranks))
    trained = competitors(model, places)
    for one in trained.values():
        for _ in range(2):
            one.step()
    found = []
    for rate in rates:
        if link:
            link.limit(limit_of(rate))
        dist.barrier()
        began = busy(), time.process_time(), time.monotonic()
        module, loss = task(model, torch.Generator().manual_seed(rank))
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        setting = Setting(Model(model, shapes, module, loss), "sgd", None, None)
        planned = measure(setting, torch.device("cpu"), places, lambda _: None)
        del module, loss
        measured: dict[str, list[float]] = {name: [] for name in trained}
        for _ in range(PASSES):
            for name, one in trained.items():
                measured[name] += steps_of(one, seconds / len(trained) / PASSES)
        probes = {name: {str(n): s for n, s in probe.seconds.items()} for name, probe in planned.links.probes.items()}
        found.append(
            {
                "model": model,
                "rate": rate,
                "ranks": ranks,
                "places": places,
                "took": planned.took,
                "others": others(began),
                "overlap": planned.links.speeds.overlap,
                "alone": planned.alone,
                "forecast": [tuple(vars(f).values()) for f in planned.found],
                "measured": measured,
                "probes": probes,
            }
        )
        if rank == 0:
            Path(folder, f"{rate}.done").touch()
    if rank == 0:
        torch.save(found, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


Run = dict[str, Any]
"""One setting: what worker() finds in it."""


def run(ranks: int, places: int, model: str, rates: Sequence[str], seconds: float, bar: Any) -> list[Run]:
    """Returns what worker() finds at each rate, by ranks that live no longer than this call."""
    with namespaces.switch(), tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(worker, (ranks, places, model, rates, seconds, folder), ranks, join=False)
        done = 0
        while not processes.join(timeout=1):
            if (now := len(list(Path(folder).glob("*.done")))) > done:
                bar.update(now - done)
                done = now
        bar.update(len(rates) - done)
        found: list[Run] = torch.load(f"{folder}/result.pt")
        return found


def errors(runs: Sequence[Run]) -> list[float]:
    """Returns predicted over measured, less 1, of all competitors in all settings."""
    found = []
    for one in runs:
        predicted = {f.name: f.seconds for f in forecasts_of(one)}
        found += [predicted[name] / statistics.median(seconds) - 1 for name, seconds in one["measured"].items()]
    return found


def forecasts_of(one: Run) -> list[Forecast]:
    """Returns what plan said."""
    return [Forecast(*values) for values in one["forecast"]]


def label(one: Run) -> list[str]:
    """Returns the setting, for a table."""
    nodes = f"{one['ranks'] // one['places']}x{one['places']}" if one["places"] > 1 else str(one["ranks"])
    return [nodes, one["model"], one["rate"]]


def rows_of(one: Run) -> list[list[str]]:
    """Returns a row for each competitor."""
    rows = []
    predicted = {f.name: f for f in forecasts_of(one)}
    for name, seconds in one["measured"].items():
        said, median = predicted[name], statistics.median(seconds)
        spread = f"{1e3 * median:.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
        parts = [f"{1e3 * said.seconds:.1f}", f"{1e3 * said.waiting:.1f}"]
        rows.append([*label(one), NAMES[name], *parts, spread, f"{100 * (said.seconds / median - 1):+.0f} %"])
    return rows


def choices(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a row for each setting: what plan recommends among what was measured, and what that costs."""
    rows = []
    for one in runs:
        medians = {name: statistics.median(seconds) for name, seconds in one["measured"].items()}
        chosen = recommended([f for f in forecasts_of(one) if f.name in medians]).name
        best = min(medians, key=medians.__getitem__)
        loss = medians[chosen] / medians[best] - 1
        about = [f"{100 * one['overlap']:.0f} %", f"{one['took']:.0f}", f"{one['others']:.1f}"]
        rows.append([*label(one), NAMES[chosen], NAMES[best], f"{100 * loss:.0f} %", *about])
    return rows


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """Returns what was aimed at, and what came of it."""
    sizes = sorted(map(abs, errors(runs)))
    median, within = statistics.median(sizes), sum(size <= WITHIN for size in sizes)
    took = max(one["took"] for one in runs)

    def verdict(reached: bool) -> str:
        return "reached" if reached else "NOT REACHED"

    return [
        ["error, median", f"<= {100 * MEDIAN:.0f} %", f"{100 * median:.1f} %", verdict(median <= MEDIAN)],
        ["error, largest", f"<= {100 * WITHIN:.0f} %", f"{100 * sizes[-1]:.0f} %", verdict(sizes[-1] <= WITHIN)],
        [f"errors within {100 * WITHIN:.0f} %", "all", f"{within} of {len(sizes)}", verdict(within == len(sizes))],
        ["seconds of measuring, most", f"< {PATIENCE:.0f}", f"{took:.1f}", verdict(took < PATIENCE)],
    ]


def parsed() -> argparse.Namespace:
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="of each direction, as tc writes them")
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[*MODELS, "tiny"])
    parser.add_argument("--seconds", type=float, default=12, help="for the timed steps of a setting, about")
    parser.add_argument("--no-nodes", action="store_true", help="without the settings of nodes")
    parser.add_argument(
        "--out", type=result_name, help="name under results/; default: plan_check if all settings run, else nothing"
    )
    args = parser.parse_args()
    try:
        for rate in args.rates:
            namespaces.bits(rate)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    """Measures and reports."""
    args = parsed()
    if missing := namespaces.missing():
        sys.exit(f"plan_check: expected links with limits, which need root on Linux, got: {missing}")
    keep_freed_memory()
    load = os.getloadavg()[0]
    plans = [(ranks, 1, model, args.rates) for ranks in args.ranks for model in args.models]
    if not args.no_nodes:
        plans += [(NODES[0] * NODES[1], NODES[1], model, list(NODE_RATES)) for model in NODE_MODELS]
    runs: list[Run] = []
    with tqdm(total=sum(len(rates) for *_, rates in plans), desc="settings", file=sys.stderr) as bar:
        for ranks, places, model, rates in plans:
            runs += run(ranks, places, model, rates, args.seconds, bar)
    every = set(args.rates) >= set(RATES) and set(args.ranks) >= set(RANKS) and set(args.models) >= set(MODELS)
    name = args.out or ("plan_check" if every and not args.no_nodes else None)
    report(
        name,
        "What plan aims at, of all settings below.",
        ["what", "target", "measured", ""],
        summary(runs),
        {"load_before": load, "runs": runs},
        [
            (
                "What plan recommends among the four or five that were trained, which of them was the fastest, and how "
                "much slower the recommended one was. Overlap: the share of an exchange that goes on while a rank "
                "computes, as plan measured it. Others: processors that other processes of the machine kept busy.",
                [
                    "ranks",
                    "model",
                    "rate",
                    "recommended",
                    "fastest",
                    "slower by",
                    "overlap",
                    "measured in, s",
                    "others",
                ],
                choices(runs),
            ),
            (
                "Milliseconds of a step: predicted, how much of that is waiting for the network, and measured, median "
                f"(lowest to highest). Load of the machine before the run: {load:.1f} on {os.cpu_count()} cores.",
                ["ranks", "model", "rate", "competitor", "predicted", "waiting", "measured", "error"],
                [row for one in runs for row in rows_of(one)],
            ),
        ],
    )


if __name__ == "__main__":
    main()
