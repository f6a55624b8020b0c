"""Tables, targets and the plot of network.py."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib

from benchmarks import harness

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from . import namespaces

COLOURS = {
    "ddp": "tab:gray",
    "ddp fp16": "tab:purple",
    "powersgd": "tab:orange",
    "topk": "tab:green",
    "dgc": "tab:blue",
    "dgc door": "tab:cyan",
    "dgc auto": "tab:olive",
}
Run = dict[str, Any]
"""Of one number of ranks and one model: what network.worker returns."""

TARGETS = (
    ("1gbit", "dgc", "no_sync", "<=", 1.25),
    ("1gbit", "ddp", "dgc", ">=", 4.0),
    ("1gbit", "powersgd", "dgc", ">=", 1.5),
    ("1gbit", "dgc door", "no_sync", "<=", 1.15),
    ("100mbit", "dgc", "no_sync", "<=", 1.35),
    ("100mbit", "ddp", "dgc", ">=", 30.0),
    ("10gbit", "ddp", "dgc", ">", 1.0),
    ("10gbit", "ddp fp16", "dgc", ">", 1.0),
    ("10gbit", "powersgd", "dgc", ">", 1.0),
)
HOLDS = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}
"""Of the MLP on two ranks: rate, times of which two competitors, and what their ratio has to be."""


def ratio(run: Run, rate: str, name: str, to: str) -> tuple[float, float, float]:
    """Returns median, lowest and highest ratio of two competitors' times, in the rounds in which both took a step."""
    seconds = run["rates"][rate]
    both = [r for r in seconds[name] if r in seconds[to]]
    return harness.ratio({n: [seconds[n][r] for r in both] for n in (name, to)}, name, to)


def rivals(run: Run) -> list[str]:
    """Returns the competitors of a run but the limit."""
    (seconds, *_) = run["rates"].values()
    return [name for name in seconds if name != "no_sync"]


def label(run: Run) -> str:
    """Returns what a row is about."""
    return f"{run['model']}, {run['parameters'] / 1e6:.1f}M"


def times(runs: Sequence[Run], ranks: int, where: str) -> harness.Table:
    """Returns each step over no_sync."""
    rows = []
    for run in (run for run in runs if run["ranks"] == ranks):
        for rate, seconds in run["rates"].items():
            limit = 1e3 * statistics.median(seconds["no_sync"].values())
            ratios = [harness.shown(*ratio(run, rate, name, "no_sync")) for name in rivals(run)]
            rows.append([label(run), rate, f"{limit:.0f}", *ratios])
    title = (
        f"{ranks} ranks{where}: time of a step / time of a step without exchange (no_sync), median of the timed steps "
        "(lowest to highest). gradient_as_bucket_view=True for all."
    )
    return title, ["model, parameters", "rate", "no_sync, ms", *rivals(runs[0])], rows


def speed_ups(runs: Sequence[Run]) -> harness.Table:
    """Returns how many times faster dgc is, and the rate that there really was."""
    rows, others = [], [name for name in rivals(runs[0]) if name != "dgc"]
    for run in runs:
        for rate, seconds in run["rates"].items():
            ratios = [harness.shown(*ratio(run, rate, name, "dgc")) for name in others]
            steps = [len(of) for of in seconds.values()]
            link = f"{run['reached'][rate]:,.0f}" if rate in run["reached"] else "-"
            rows.append([run["ranks"], run["model"], rate, link, *ratios, f"{min(steps)} to {max(steps)}"])
    title = (
        "Time of a step / time of a step with dgc. Link: what a rank sends in a plain all-reduce at that time, in "
        "Mbit/s of frames; where it stays behind the rate, the processor is the limit."
    )
    return title, ["ranks", "model", "rate", "link", *[f"{name} / dgc" for name in others], "steps"], rows


def traffic(runs: Sequence[Run]) -> harness.Table:
    """Returns counted bytes against those of the stats."""
    rows = []
    for run in runs:
        counted = [f"{run['bytes'][name]:,.0f}" for name in rivals(run)]
        rows.append(
            [run["ranks"], run["model"], *counted, f"{run['stats']:,}", f"{run['bytes']['dgc'] / run['stats']:.3f}"]
        )
    title = (
        "Bytes that leave a rank in a step: frames with headers and acknowledgements, counted by the kernel; stats: "
        "state.stats.bytes_sent, tensors alone."
    )
    return title, ["ranks", "model", *rivals(runs[0]), "dgc's stats", "counted / stats"], rows


def targets(runs: Sequence[Run]) -> harness.Table:
    """Returns what was aimed at, what came of it."""
    rows = []
    for rate, name, to, bound, target in TARGETS:
        for run in runs:
            there = {"no_sync", *rivals(run)}
            if run["model"] == "mlp" and run["ranks"] == 2 and rate in run["rates"] and {name, to} <= there:
                median, low, high = ratio(run, rate, name, to)
                verdict = "reached" if HOLDS[bound](median, target) else "NOT REACHED"
                rows.append([rate, f"{name} / {to}", f"{bound} {target:g}", harness.shown(median, low, high), verdict])
    return "Targets: MLP, 2 ranks, medians.", ["rate", "time", "target", "measured", ""], rows


def report(name: str | None, runs: Sequence[Run], latency_ms: float) -> None:
    """Prints all tables, and writes them, the raw figures and the plot to results/ where there is a name."""
    limited = any(run["bytes"] for run in runs)
    latency = f"latency {latency_ms:g} ms" if latency_ms else "no latency set"
    where = f", real limits, {latency}" if limited else ", NO LIMIT: loopback"
    tables = [times(runs, ranks, where) for ranks in sorted({run["ranks"] for run in runs})]
    tables.append(speed_ups(runs))
    if limited:
        tables.append(traffic(runs))
    if (aimed := targets(runs))[2]:
        tables.append(aimed)
    (title, headers, rows), *more = tables
    raw = {"limited": limited, "latency_ms": latency_ms, "runs": runs}
    harness.report(name, title, headers, rows, raw, more)
    if name and limited:
        plot(name, runs)


def plot(name: str, runs: Sequence[Run]) -> None:
    """Writes step time over no_sync against the rate: a row for each number of ranks, a column for each model."""
    all_ranks, models = sorted({run["ranks"] for run in runs}), list(dict.fromkeys(run["model"] for run in runs))
    size = (2.6 * len(models) + 1, 2.5 * len(all_ranks) + 1)
    figure, grid = pyplot.subplots(
        len(all_ranks), len(models), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for run in runs:
        axes = grid[all_ranks.index(run["ranks"])][models.index(run["model"])]
        rates = sorted(run["rates"], key=namespaces.bits)
        for rival in rivals(run):
            medians, lows, highs = zip(*(ratio(run, rate, rival, "no_sync") for rate in rates), strict=True)
            style = {"color": COLOURS[rival], "linewidth": 2.5 if rival == "dgc" else 1.2}
            axes.plot(rates, medians, marker="o", markersize=4, label=rival, **style)
            axes.fill_between(rates, lows, highs, color=COLOURS[rival], alpha=0.12, linewidth=0)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{label(run)}, {run['ranks']} ranks", fontsize=9)
        axes.grid(alpha=0.3, which="both")
    figure.supxlabel("rate of each rank's link, both directions")
    figure.supylabel("time of a step / without exchange")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(harness.RESULTS / f"{name}.png", dpi=150)
    pyplot.close(figure)
