"""Tables, targets and the plot of network.py --nodes."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence

import matplotlib

from benchmarks import harness

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from benchmarks.training.node_competitors import COMPRESSED, NODE_NAMES

from .report import Run, label, ratio

RIVALS = NODE_NAMES[1:]  # all but the limit
TIMES = (("1gbit", operator.gt, ">", 1.0), ("100mbit", operator.gt, ">", 1.0), ("open", operator.ge, ">=", 0.98))
"""Rate, and what the time of a step of flat dgc has to be over that of dgc with nodes."""
BYTES = 0.27
"""What dgc with nodes may send over a node's link, of what flat dgc sends."""
COLOURS = ("tab:gray", "tab:purple", "tab:cyan", "tab:blue", "tab:brown", "tab:green")


def times(runs: Sequence[Run], where: str) -> harness.Table:
    """Returns each step over no_sync."""
    rows = []
    for run in runs:
        for rate, seconds in run["rates"].items():
            limit = 1e3 * statistics.median(seconds["no_sync"].values())
            ratios = [harness.shown(*ratio(run, rate, name, "no_sync")) for name in RIVALS]
            rows.append([run["nodes"], label(run), rate, f"{limit:.0f}", *ratios])
    title = (
        f"Nodes by ranks of a node{where}: time of a step / time of a step without exchange (no_sync), median of the "
        "timed steps (lowest to highest)."
    )
    return title, ["nodes", "model, parameters", "rate", "no_sync, ms", *RIVALS], rows


def speed_ups(runs: Sequence[Run]) -> harness.Table:
    """Returns how many times faster dgc with nodes is, and the rate that there really was."""
    others = [name for name in RIVALS if name != "dgc nodes"]
    rows = []
    for run in runs:
        for rate, seconds in run["rates"].items():
            ratios = [harness.shown(*ratio(run, rate, name, "dgc nodes")) for name in others]
            steps = [len(seconds[name]) for name in NODE_NAMES]
            link = f"{run['reached'][rate]:,.0f}" if rate in run["reached"] else "-"
            rows.append([run["nodes"], run["model"], rate, link, *ratios, f"{min(steps)} to {max(steps)}"])
    title = (
        "Time of a step / time of a step with dgc nodes. Link: what a node sends in a plain all-reduce of all ranks at "
        "that time, in Mbit/s of frames; where it stays behind the rate, the processor is the limit."
    )
    return title, ["nodes", "model", "rate", "link", *[f"{name} / dgc nodes" for name in others], "steps"], rows


def traffic(runs: Sequence[Run]) -> harness.Table:
    """Returns counted bytes."""
    rows = [[run["nodes"], run["model"], *[f"{run['bytes'][name]:,.0f}" for name in RIVALS]] for run in runs]
    title = "Bytes that leave a node in a step: frames with headers and acknowledgements, counted by the kernel."
    return title, ["nodes", "model", *RIVALS], rows


def stats(runs: Sequence[Run]) -> harness.Table:
    """Returns what the package says that a node's ranks send, beside what was counted."""
    rows = []
    for run in runs:
        said = [f"{run['stats'][name]:,}" for name in COMPRESSED]
        ratios = [f"{run['bytes'][name] / run['stats'][name]:.3f}" for name in COMPRESSED]
        rows.append([run["nodes"], run["model"], *said, *ratios])
    title = (
        "state.stats.bytes_sent in a step, of a node's ranks together, tensors alone. Flat dgc's goes to ranks of the "
        "same node, too; that of the others goes to other nodes."
    )
    return title, ["nodes", "model", *COMPRESSED, *[f"{name}, counted / stats" for name in COMPRESSED]], rows


def targets(runs: Sequence[Run]) -> harness.Table:
    """Returns what was aimed at, what came of it."""
    rows = []
    for run in runs:
        where = [run["nodes"], run["model"]]
        if run["bytes"]:
            share = run["bytes"]["dgc nodes"] / run["bytes"]["dgc"]
            found = f"{share:.3f}", "reached" if share <= BYTES else "NOT REACHED"
            rows.append([*where, "bytes on the link", "dgc nodes / dgc", f"<= {BYTES:g}", *found])
        for rate, holds, bound, target in TIMES:
            if rate in run["rates"]:
                median, low, high = ratio(run, rate, "dgc", "dgc nodes")
                verdict = "reached" if holds(median, target) else "NOT REACHED"
                shown = harness.shown(median, low, high)
                rows.append([*where, f"time, {rate}", "dgc / dgc nodes", f"{bound} {target:g}", shown, verdict])
    return "Targets, medians.", ["nodes", "model", "what", "of", "target", "measured", ""], rows


def report_nodes(name: str | None, runs: Sequence[Run], latency_ms: float) -> None:
    """Prints all tables, and writes them, the raw figures and the plot to results/ where there is a name."""
    limited = any(run["bytes"] for run in runs)
    latency = f"latency {latency_ms:g} ms" if latency_ms else "no latency set"
    where = f", real limits on a node's link, {latency}" if limited else ", NO LIMIT: loopback"
    title, headers, rows = times(runs, where)
    more = [speed_ups(runs)]
    if limited:
        more += [traffic(runs), stats(runs), targets(runs)]
    raw = {"limited": limited, "latency_ms": latency_ms, "runs": runs}
    harness.report(name, title, headers, rows, raw, more)
    if name and limited:
        plot(name, runs)


def plot(name: str, runs: Sequence[Run]) -> None:
    """Writes step time over no_sync against the rate: a row for each layout of nodes, a column for each model."""
    layouts, models = (list(dict.fromkeys(run[of] for run in runs)) for of in ("nodes", "model"))
    size = (3.4 * len(models) + 1, 2.5 * len(layouts) + 1)
    figure, grid = pyplot.subplots(
        len(layouts), len(models), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for run in runs:
        axes = grid[layouts.index(run["nodes"])][models.index(run["model"])]
        rates = [*run["rates"]][::-1]
        for rival, colour in zip(RIVALS, COLOURS, strict=True):
            medians, lows, highs = zip(*(ratio(run, rate, rival, "no_sync") for rate in rates), strict=True)
            width = 2.5 if rival == "dgc nodes" else 1.2
            axes.plot(rates, medians, marker="o", markersize=4, label=rival, color=colour, linewidth=width)
            axes.fill_between(rates, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{label(run)}, {run['nodes']} ranks", fontsize=9)
        axes.grid(alpha=0.3, which="both")
    figure.supxlabel("rate of each node's link, both directions")
    figure.supylabel("time of a step / without exchange")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(harness.RESULTS / f"{name}.png", dpi=150)
    pyplot.close(figure)
