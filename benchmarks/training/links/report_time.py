"""Tables, targets and the plot of time_to_accuracy.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks import harness
from benchmarks.accuracy.runs import Point

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from .report import COLOURS as OF_STEPS

COLOURS = {
    "ddp": OF_STEPS["ddp"],
    "ddp bf16": OF_STEPS["ddp fp16"],
    "powersgd": OF_STEPS["powersgd"],
    "dgc": OF_STEPS["dgc"],
    "dgc, no warm-up": OF_STEPS["dgc door"],
    "dgc auto": OF_STEPS["dgc auto"],
}
NOT_REACHED = "not reached"
TARGETS = (
    *(
        (task, rate, method, least)
        for task in ("gpt-adamw", "gpt-4.5M")
        for rate, least in (("1gbit", 1.5), ("100mbit", 5.0))
        for method in ("dgc", "dgc, no warm-up")
    ),
    (None, None, "dgc", 0.98),
    (None, None, "dgc, no warm-up", 0.98),
    (None, None, "dgc auto", 0.98),
)
"""Task and rate (None: all), method, and how many times as fast as the best rival it has to be at least."""


class Reading(NamedTuple):
    """What it took to reach a target."""

    steps: float
    seconds: float
    bytes: float
    """That a rank has sent."""


@dataclass(frozen=True)
class Setting:
    """What is compared in one table: all methods' curves, by seed."""

    task: str
    rate: str
    ranks: int
    about: str
    metric: str
    target: float
    curves: Mapping[str, Sequence[Sequence[Point]]]
    """Points (step, metric, seconds, bytes) of each seed, by method."""

    def readings(self, method: str) -> list[Reading | None]:
        """Returns what it took, by seed."""
        return [reading(curve, self.target, self.metric) for curve in self.curves[method]]


def reading(curve: Sequence[Point], target: float, metric: str) -> Reading | None:
    """Returns where a curve first reaches a target, on the straight line between two evaluations; None: it does not.

    Args:
        curve: points (step, metric, seconds, bytes), the first one before training.
        target: to be reached.
        metric: "accuracy", which has to rise to it; "perplexity", which has to fall.
    """
    sign = 1 if metric == "accuracy" else -1
    before = curve[0]
    for after in curve:
        if sign * after[1] >= sign * target:
            way = after[1] - before[1]
            share = (target - before[1]) / way if way and math.isfinite(way) else 1.0
            steps, _, seconds, sent = (a + share * (b - a) for a, b in zip(before, after, strict=True))
            return Reading(steps, seconds, sent)
        before = after
    return None


def ratios(setting: Setting, method: str, rivals: Sequence[str], what: str) -> list[float | None]:
    """Returns what the best rival took over what a method took, by seed; None where one of them is not there.

    Args:
        setting: all methods' curves.
        method: that is compared.
        rivals: of which the best one counts, seed by seed.
        what: "seconds" or "bytes".
    """
    found: list[float | None] = []
    by_seed = zip(*(setting.readings(name) for name in rivals), strict=True)
    for own, others in zip(setting.readings(method), by_seed, strict=True):
        there = [getattr(other, what) for other in others if other]
        found.append(min(there) / getattr(own, what) if own and there else None)
    return found


def shown(found: Sequence[float | None]) -> str:
    """Returns median, lowest and highest of the seeds' ratios, if all of them are there."""
    numbers = [ratio for ratio in found if ratio is not None]
    if len(numbers) < len(found) or any(map(math.isnan, numbers)):
        return "-"
    return harness.shown(statistics.median(numbers), min(numbers), max(numbers))


def table(setting: Setting, rivals: Sequence[str]) -> harness.Table:
    """Returns seconds, steps and bytes to the target, by seed."""
    rows = []
    for method, curves in setting.curves.items():
        readings = setting.readings(method)
        seconds = [f"{it.seconds:.1f}" if it else NOT_REACHED for it in readings]
        steps = [f"{it.steps:,.0f}" if it else NOT_REACHED for it in readings]
        sent = [NOT_REACHED if not it else "-" if math.isnan(it.bytes) else f"{it.bytes / 1e6:,.1f}" for it in readings]
        last = [f"{curve[-1][1]:.1f} after {curve[-1][0]:,}" for curve in curves]
        faster = [shown(ratios(setting, method, rivals, what)) for what in ("seconds", "bytes")]
        rows.append([method, *map(", ".join, (seconds, steps, sent)), *faster, ", ".join(last)])
    limit = "NO LIMIT: loopback" if setting.rate == "unlimited" else setting.rate
    title = (
        f"**{setting.task}, {limit}, {setting.ranks} ranks**, to {setting.metric} {setting.target:g}: {setting.about}."
    )
    best = f"best of {' and '.join(rivals)}"
    headers = ["method", "seconds", "steps", "MB a rank sends", f"seconds of the {best} / its own"]
    return title, [*headers, f"bytes of the {best} / its own", f"last {setting.metric}, and steps"], rows


def targets(settings: Sequence[Setting], rivals: Sequence[str]) -> harness.Table:
    """Returns what was aimed at, and what came of it."""
    rows = []
    for task, rate, method, least in TARGETS:
        for setting in settings:
            if task in (None, setting.task) and rate in (None, setting.rate) and method in setting.curves:
                found = ratios(setting, method, rivals, "seconds")
                numbers = [ratio for ratio in found if ratio is not None]
                enough = len(numbers) == len(found) and statistics.median(numbers) >= least
                where = [setting.task, setting.rate, setting.ranks, method, f">= {least:g}"]
                rows.append([*where, shown(found), "reached" if enough else "NOT REACHED"])
    title = "Targets: how many times as fast as the best rival, start to target, medians."
    return title, ["task", "rate", "ranks", "method", "target", "measured", ""], rows


def report_time(
    name: str, about: str, settings: Sequence[Setting], rivals: Sequence[str], raw: Mapping[str, Any], folder: Path
) -> None:
    """Prints all tables, and writes them with raw figures and the plot to a folder."""
    (title, headers, rows), *more = [*(table(setting, rivals) for setting in settings), targets(settings, rivals)]
    harness.report(name, f"{about}\n\n{title}", headers, rows, raw, more, folder)
    plot(settings, folder / f"{name}.png")


def plot(settings: Sequence[Setting], picture: Path) -> None:
    """Draws the metric against seconds: a row for each task and number of ranks, a column for each rate."""
    lines = list(dict.fromkeys((it.task, it.ranks) for it in settings))
    rates = list(dict.fromkeys(it.rate for it in settings))
    size = (3.6 * len(rates) + 1.4, 2.8 * len(lines) + 1)
    figure, grid = pyplot.subplots(len(lines), len(rates), figsize=size, squeeze=False, layout="constrained")
    for setting in settings:
        axes = grid[lines.index((setting.task, setting.ranks))][rates.index(setting.rate)]
        for method, curves in setting.curves.items():
            for curve in curves:
                _, metrics, seconds, _ = zip(*curve[1:], strict=True)
                label = {"label": method} if curve is curves[0] else {}
                axes.plot(seconds, metrics, color=COLOURS[method], linewidth=1.1, alpha=0.8, **label)
        axes.axhline(setting.target, color="black", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        rising = setting.metric == "accuracy"
        axes.set_ylim(
            *((setting.target - 10, setting.target + 2) if rising else (setting.target / 1.1, 3 * setting.target))
        )
        axes.set_title(f"{setting.task}, {setting.rate}, {setting.ranks} ranks", fontsize=9)
        axes.set_ylabel(f"test {setting.metric}", fontsize=9)
        axes.grid(alpha=0.3, which="both")
    figure.supxlabel("seconds of training; dotted: the target; a line for each seed", fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3 * len(rates)), frameon=False)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
