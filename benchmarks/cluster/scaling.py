"""From measured steps to clusters: a cost model, how well it fits, and where DGC would win and lose.

    python -m benchmarks.cluster.scaling

Reads results/network.json (`python -m benchmarks.training.network` writes it), fits the model's constants to it, and
projects to GPUs and up to 4,096 workers. docs/scaling.md has the formulas and what they leave out. The projections are
arithmetic: no such cluster has been measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

from benchmarks.training.links import namespaces

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from benchmarks.harness import RESULTS, report
from dgc.cli.shapes import Shapes

from . import islands
from .calibration import Measured, calibrate, constants_table, points, table
from .projection import GBITS, NODES, WORKERS, WORKLOADS, Assumptions, Projected, losses, project, sensitivity

SPEEDUPS = (0.5, 1, 2, 5, 10, 20, 50)
"""Marks of the picture."""


def read(path: Path) -> tuple[list[Measured], dict[str, Shapes]]:
    """Returns what network.py measured, and each model's shapes.

    A link's rate is what an all-reduce had of it, where that is less than what was set: 10 Gbit/s are more than some
    processors move.

    Raises:
        ValueError: the runs had no limits.
    """
    runs = json.loads(path.read_text())["runs"]
    if not all(run["reached"] for run in runs):
        raise ValueError(f"{path}: expected runs with limits, got some on a loopback: run network.py as root")
    measured = [
        Measured(
            run["model"],
            min(namespaces.bits(rate), 1e6 * run["reached"][rate]),
            run["ranks"],
            name,
            statistics.median(seconds.values()),
            run["bytes"][name],
        )
        for run in runs
        for rate, competitors in run["rates"].items()
        for name, seconds in competitors.items()
    ]
    return measured, {run["model"]: {name: tuple(s) for name, s in run["shapes"].items()} for run in runs}


def marked(p: Projected) -> str:
    """Returns a speed-up as the tables show it."""
    text = f"{p.speedup:.2f}" if p.speedup >= 1 else f"{p.speedup:.3f} loses"
    return text + ", all dense" * p.all_dense


def draw(projected: Sequence[Projected], picture: Path) -> None:
    """Draws speed-up against workers, a panel for each network, a colour for each rate."""
    networks = list(dict.fromkeys(p.network for p in projected))
    figure, panels = pyplot.subplots(
        2, 2, figsize=(10, 8), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes, network in zip(panels.flat, networks, strict=True):
        for colour, gbits in enumerate(GBITS):
            for per_node, style in zip(NODES, ("-", "--"), strict=True):
                line = [p for p in projected if (p.network, p.gbits, p.per_node) == (network, gbits, per_node)]
                label = f"{gbits} Gb/s, {per_node} worker{'s' * (per_node > 1)} a node"
                workers, speedups = [p.workers for p in line], [p.speedup for p in line]
                axes.plot(workers, speedups, style, color=f"C{colour}", label=label, linewidth=1.2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=network)
        axes.set_xticks(WORKERS, [f"{n:,}" for n in WORKERS], minor=False)
        axes.set_yticks(SPEEDUPS, [f"{s:g}" for s in SPEEDUPS], minor=False)
        axes.minorticks_off()
    for axes in panels[1]:
        axes.set_xlabel("workers")
    for axes in panels[:, 0]:
        axes.set_ylabel("speed-up over the better dense exchange")
    panels[0, 0].legend(fontsize="x-small")
    figure.suptitle("Projected, not measured. Below the line DGC loses.", fontsize="medium")
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Calibrates, projects and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, default=RESULTS / "network.json", help="what network.py measured")
    path = parser.parse_args().network
    if not path.exists():
        parser.error(
            f"--network: expected the figures that the model is calibrated with, but there is no {path}. "
            "Run `python -m benchmarks.training.network` first, or name another file"
        )
    try:
        measured, shapes = read(path)
    except ValueError as error:
        parser.error(f"--network: {error}")
    runs = points(measured, shapes)
    constants = calibrate(runs)
    projected = [p for workload in WORKLOADS for p in project(workload, constants.share, WORKERS)]
    projected.sort(key=lambda p: ([w.network for w in WORKLOADS].index(p.network), -p.per_node))

    settings: dict[tuple[str, int, int], list[Projected]] = {}
    for p in projected:
        settings.setdefault((p.network, p.per_node, p.workers), []).append(p)
    speedups = [
        [network, per_node, f"{workers:,}", *map(marked, group)]
        for (network, per_node, workers), group in settings.items()
    ]
    milliseconds = [
        [network, per_node, f"{workers:,}"]
        + [" / ".join(f"{1e3 * seconds:,.0f}" for seconds in (p.fp32, p.fp16, p.dgc)) for p in group]
        for (network, per_node, workers), group in settings.items()
    ]
    errors = sorted(abs(run.predict(constants) / run.measured.seconds - 1) for run in runs)
    workloads = [[w.network, w.gpu.name, f"{1e3 * w.seconds:.0f}", w.about] for w in WORKLOADS]
    words = losses(projected)
    assumed = Assumptions().latency
    sizes, limits = islands.tables(constants.share)
    rates = [f"{gbits} Gb/s" for gbits in GBITS]
    headers = ["network", "workers a node", "workers", *(f"{gbits} Gb/s" for gbits in GBITS)]
    report(
        "scaling",
        "Projected speed-up of DGC (0.1 %, defaults) over the better of DDP in float32 and in 16 bits. Arithmetic, not "
        "measured; docs/scaling.md has the formulas. 8 workers in a node of 8 use no network.",
        headers,
        speedups,
        {
            "constants": asdict(constants),
            "errors": errors,
            "projected": [{**asdict(p), "speedup": p.speedup} for p in projected],
            "losses": words,
            "islands": {"exchanges": sizes, "dense_from": limits},
        },
        [
            ("Milliseconds of a step: DDP float32 / DDP 16 bits / DGC.", headers, milliseconds),
            ("Where DGC loses.", ["by these figures"], [[sentence] for sentence in words]),
            (
                f"How much that depends on the latency from node to node: {1e6 * assumed:.0f} us is what the "
                "projection assumes, 4 us NCCL's figure for its protocol LL128; the last is what calibration found for "
                "gloo.",
                ["latency, us", "settings in which DGC loses"],
                sensitivity(constants.share, (0.0, 4e-6, assumed, constants.latency)),
            ),
            (
                f"Nodes of {islands.PLACES} ranks as workers: MB over a node's link each way, and milliseconds of the "
                "exchange, hidden or not. DDP 16 bits / DGC, each rank a worker / DGC, nodes as workers under DDP. "
                "512 nodes have 4,096 ranks, with which the second sends everything dense, in float32.",
                ["network", "nodes", "MB", *rates],
                sizes,
            ),
            (
                "The number of nodes from which an all-reduce of 16 bits is faster than that all-gather between nodes.",
                ["network", *rates],
                limits,
            ),
            (
                "Compute time of one worker: published figures, assumed. Llama-3-8B with gradients, u and v in float32 "
                "needs 128 GB a worker, more than this GPU has: there it stands for a large model.",
                ["network", "GPU", "ms", "step"],
                workloads,
            ),
            (
                "Constants from calibration; the projection takes over the first.",
                ["constant", ""],
                constants_table(constants),
            ),
            (
                f"Calibration: predicted against measured, {len(runs)} settings. Error: median "
                f"{100 * errors[len(errors) // 2]:.0f} %, largest {100 * errors[-1]:.0f} %. The constants were fitted "
                "to these same runs.",
                ["model", "Gb/s", "ranks", "competitor", "ms", "predicted", "error", "MB sent", "predicted"],
                table(runs, constants),
            ),
        ],
    )
    fine = [2**i for i in range(3, 13)]
    draw([p for workload in WORKLOADS for p in project(workload, constants.share, fine)], RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
