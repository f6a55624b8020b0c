"""Scores of several methods on the same seeds: means, paired differences with intervals, tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot
from scipy import stats

from benchmarks.harness import Table, report

from .runs import Record
from .tasks import TASKS


class Difference(NamedTuple):
    """What a method costs, seed by seed: in points of accuracy, or in per cent of perplexity."""

    mean: float
    low: float
    high: float
    """Of the 95 % confidence interval of the mean (Student's t)."""


def interval(values: Sequence[float]) -> Difference:
    """Returns mean and interval of independent values, at least two."""
    mean = statistics.fmean(values)
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Difference(mean, mean - spread, mean + spread)


def paired(task: str, scores: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Returns the difference of each score to a reference's, in points of accuracy or in per cent of perplexity."""
    relative = TASKS[task].metric == "perplexity"
    return [100 * (a / b - 1) if relative else a - b for a, b in zip(scores, reference, strict=True)]


def difference(task: str, scores: Sequence[float], reference: Sequence[float]) -> Difference:
    """Returns the paired difference of scores to a reference's, of the same seeds in the same order."""
    return interval(paired(task, scores, reference))


def reaches(task: str, found: Difference) -> bool:
    """Returns whether accuracy surely falls by less than 0.5 points, or perplexity rises by less than 1 %."""
    return found.high < 1 if TASKS[task].metric == "perplexity" else found.low > -0.5


def scores(records: Iterable[Record], task: str, method: str, seeds: Iterable[int]) -> list[float]:
    """Returns the final metric by seed."""
    by_seed = {r.run.seed: r.score for r in records if (r.run.task, r.run.method) == (task, method)}
    return [by_seed[seed] for seed in seeds]


HEADERS = ("method", "mean", "SD", "difference to {}", "95 % interval")


def table(
    records: Sequence[Record], task: str, methods: Iterable[str], reference: str, seeds: Sequence[int]
) -> tuple[list[list[Any]], dict[str, Difference]]:
    """Returns rows under HEADERS, and the differences by method."""
    rows: list[list[Any]] = []
    found: dict[str, Difference] = {}
    base = scores(records, task, reference, seeds)
    unit = " %" if TASKS[task].metric == "perplexity" else ""
    for method in methods:
        own = scores(records, task, method, seeds)
        row = [method, f"{statistics.fmean(own):.2f}", f"{statistics.stdev(own):.2f}", "", ""]
        if method != reference:
            it = found[method] = difference(task, own, base)
            row[3:] = [f"{it.mean:+.2f}{unit}", f"{it.low:+.2f} to {it.high:+.2f}{unit}"]
        rows.append(row)
    return rows, found


def publish(
    name: str,
    about: str,
    tables: Sequence[Table],
    found: Mapping[str, Mapping[str, Difference]],
    records: Iterable[Record],
    folder: Path,
) -> None:
    """Prints tables under a heading, and writes them with the raw differences to dense training."""
    raw = {
        "differences to dense": {task: {m: it._asdict() for m, it in of.items()} for task, of in found.items()},
        "commits of the runs": sorted({r.commit for r in records}),
    }
    (title, headers, first), *more = tables
    report(name, f"{about}\n\n{title}", headers, first, raw, more, folder)


def draw(found: Mapping[str, Mapping[str, Difference]], reference: str, limits: bool, picture: Path) -> None:
    """Draws the differences to the reference, a panel for accuracy and one for perplexity, better to the right.

    Args:
        found: by task, then by method.
        reference: the method at 0.
        limits: whether to draw where `reaches` ends.
        picture: the file.
    """
    by_metric: dict[str, list[tuple[str, str, Difference]]] = {}
    for task, methods in found.items():
        rows = by_metric.setdefault(TASKS[task].metric, [])
        rows += [(task, f"{task}: {method}" if len(found) > 2 else method, it) for method, it in methods.items()]
    size = (max(9.5, 6.5 * len(by_metric)), 1.3 + 0.27 * max(map(len, by_metric.values())))
    figure, panels = pyplot.subplots(1, len(by_metric), figsize=size, layout="constrained", squeeze=False)
    for axes, (metric, rows) in zip(panels[0], by_metric.items(), strict=True):
        for place, (task, _, it) in enumerate(rows):
            colour = "C0" if not limits or reaches(task, it) else "C3"
            errors = [[it.mean - it.low], [it.high - it.mean]]
            axes.errorbar(it.mean, -place, xerr=errors, fmt="o", capsize=3, markersize=4, color=colour)
        axes.set_yticks([-place for place in range(len(rows))], [label for _, label, _ in rows], fontsize="small")
        axes.set_ylim(-len(rows) + 0.5, 0.5)
        axes.axvline(0, color="black", linewidth=0.8)
        tasks = ", ".join(dict.fromkeys(task for task, *_ in rows))
        if metric == "perplexity":
            axes.invert_xaxis()
            axes.set_xlabel(f"{tasks}: perplexity, per cent")
        else:
            axes.set_xlabel(f"{tasks}: accuracy, points")
        if limits:
            axes.axvline(1 if metric == "perplexity" else -0.5, color="C3", linewidth=0.8, linestyle=":")
        axes.grid(axis="x", alpha=0.3)
    note = "; red: may be beyond the dotted line" if limits else ""
    figure.suptitle(f"Difference to {reference}, mean and 95 % interval, better to the right{note}", fontsize="medium")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
