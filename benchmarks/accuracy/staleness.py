"""How long entries wait before they are sent, by task and density.

    python -m benchmarks.accuracy.staleness

The age of an entry is the number of steps whose gradients it sums: those since the same rank last sent it, or since the
start. So 1 is an entry that did not wait, and an entry that was never sent is as old as the run. There are two ways to
count: ages of what was sent, in which an element counts as often as it was sent, and ages of what is left at the end,
in which every element of the compressed parameters counts once. Both are read off the selections that the ranks
encode, without a warm-up of density, which would send much of everything once.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot
from torch import Tensor
from tqdm import tqdm

import dgc
from benchmarks.harness import RESULTS, Table, report
from dgc.ops.codec import Codec, EliasFano
from dgc.ops.segments import Segments
from dgc.ops.selection import positions
from dgc.ops.wire import header

from .replicas import DGC, WORKERS, train
from .tasks import TASKS

TRAINED = ("mnist", "gpt", "gpt-adamw")
DENSITIES = (0.01, 0.001)
STEPS = 2000


class Ages(NamedTuple):
    """Ages on one rank of one run."""

    sent: list[int]
    """Sent entries by age, from 0, which none has, to the steps of the run."""
    left: list[int]
    """Elements of the compressed parameters by age at the end: 0 was sent at the last step, and the last one never."""


class Run(NamedTuple):
    """What a run depends on."""

    task: str
    density: float
    seed: int
    steps: int


class Watched(Codec):
    """A codec that notes the age of all that is sent, and leaves the bytes to another one."""

    def __init__(self, codec: Codec, steps: int) -> None:
        """Takes the codec that makes the bytes, and the length of the run."""
        self.codec, self.name, self.dtype = codec, codec.name, codec.dtype
        self.steps = steps
        self.sent = torch.zeros(steps + 1, dtype=torch.int64)
        self.last = torch.zeros(0, dtype=torch.int64)
        """[elements of memory]: the step, from 1, at which each was last sent; 0 for never, -1 where it stays dense."""

    def ages(self) -> Ages:
        """Returns what was noted, after the last step."""
        left = self.steps - self.last[self.last >= 0]
        return Ages(self.sent.tolist(), left.bincount(minlength=self.steps + 1).tolist())

    def encode(
        self, selection: Tensor, segments: Segments, workspace: Tensor, residual: Tensor, payload: Tensor
    ) -> None:
        """Notes what is sent, and writes the payload."""
        if not len(self.last):
            self.last = torch.full((residual.numel(),), -1)
        for row in segments.rows:
            self.last[row.state : row.state + row.numel].clamp_(min=0)
        step = int(header(selection)[1]) + 1
        chosen, _ = positions(selection, segments, self.dtype)
        self.sent += (step - self.last[chosen]).bincount(minlength=self.steps + 1)
        self.last[chosen] = step
        self.codec.encode(selection, segments, workspace, residual, payload)

    def decode(self, payloads: Tensor, segments: Segments, workspace: Tensor, selections: Tensor) -> None:
        """Reads all ranks' payloads."""
        self.codec.decode(payloads, segments, workspace, selections)

    def entry_bytes(self, density: float) -> float:
        """Returns the bytes of an entry."""
        return self.codec.entry_bytes(density)

    def nbytes(self, segments: Segments) -> int:
        """Returns the bytes of a payload."""
        return self.codec.nbytes(segments)


def perform(run: Run) -> list[Ages]:
    """Trains, and returns the ages on each rank."""
    torch.set_num_threads(1)
    task = TASKS[run.task]
    config = dgc.DGCConfig(run.density, clip_norm=task.clip_norm)
    watched = [Watched(EliasFano(config.wire_dtype), run.steps) for _ in range(WORKERS)]
    train(task, partial(DGC, config=config, codecs=watched), run.seed, run.steps)
    return [codec.ages() for codec in watched]


def quantile(counts: Sequence[int], share: float) -> int:
    """Returns the smallest age that `share` of what was counted does not exceed."""
    below = torch.tensor(counts).cumsum(0)
    return int((below >= share * int(below[-1])).nonzero()[0])


def pooled(ages: Sequence[Ages]) -> Ages:
    """Returns the counts of several ranks and runs together."""
    return Ages(*([sum(column) for column in zip(*counts, strict=True)] for counts in zip(*ages, strict=True)))


HEADERS = (
    "density",
    "sent: median age",
    "90 %",
    "99 %",
    "sent again at once",
    "left at the end: median age",
    "never sent",
)


def row_of(density: float, ages: Sequence[Ages]) -> list[str]:
    """Returns a row under HEADERS of all ranks and seeds, with the lowest and highest of them for the medians."""
    sent, left = pooled(ages)
    medians = []
    for together, each in ((sent, [a.sent for a in ages]), (left, [a.left for a in ages])):
        own = [quantile(counts, 0.5) for counts in each]
        medians.append(f"{quantile(together, 0.5):,} ({min(own):,} to {max(own):,})")
    shares = [f"{100 * part / sum(whole):.1f} %" for part, whole in ((sent[1], sent), (left[-1], left))]
    rest = [f"{quantile(sent, share):,}" for share in (0.9, 0.99)]
    return [f"{100 * density:g} %", medians[0], *rest, shares[0], medians[1], shares[1]]


Found = Mapping[str, Mapping[float, Sequence[Ages]]]
"""The ages of all ranks and seeds, by task and density."""


def edges_of(steps: int) -> list[int]:
    """Returns where the bars of the picture begin, and where the last one ends: two of them an octave."""
    rising = {round(2 ** (i / 2)) for i in range(2 * math.ceil(math.log2(steps + 1)))}
    return [0, *sorted(edge for edge in rising if 1 < edge <= steps), steps + 1]


def binned(counts: Sequence[int], edges: Sequence[int]) -> list[float]:
    """Returns the share of each bar."""
    return [sum(counts[a:b]) / sum(counts) for a, b in pairwise(edges)]


def draw(found: Found, steps: int, picture: Path) -> None:
    """Draws both ways to count, a column for each task."""
    edges = edges_of(steps)
    places = [0.7, *edges[1:]]
    figure, panels = pyplot.subplots(
        2,
        len(found),
        figsize=(1 + 3.6 * len(found), 5.6),
        sharex=True,
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for column, (task, by_density) in enumerate(found.items()):
        for row, about in enumerate(("sent entries", "elements at the end")):
            axes = panels[row, column]
            for colour, (density, ages) in zip(("C0", "C1"), by_density.items(), strict=True):
                shares = binned(pooled(ages)[row], edges)
                axes.stairs([100 * s for s in shares], places, fill=True, alpha=0.35, color=colour)
                axes.stairs([100 * s for s in shares], places, color=colour, label=f"{100 * density:g} %")
                median = quantile(pooled(ages)[row], 0.5)
                axes.axvline(max(median, 1), color=colour, linestyle=":", linewidth=1.2)
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(f"{about}, per cent")
        panels[0, column].set_title(task, fontsize="medium")
        panels[1, column].set_xlabel("age, steps")
    panels[0, 0].legend(title="density", fontsize="small")
    figure.suptitle("Age of entries; dotted: median; the last bar below has what was never sent", fontsize="medium")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def tell(found: Found, seeds: int, steps: int, folder: Path) -> None:
    """Writes tables, picture and raw figures."""
    draw(found, steps, folder / "staleness.png")
    edges = edges_of(steps)
    tables: list[Table] = []
    raw: dict[str, Any] = {"steps": steps, "seeds": seeds, "ages from": edges[:-1], "shares": {}}
    for name, by_density in found.items():
        task = TASKS[name]
        rows = [row_of(density, ages) for density, ages in by_density.items()]
        elements = sum(next(iter(by_density.values()))[0].left)
        tables.append((f"**{name}**: {task.about}. {task.recipe}. {elements:,} compressed elements.", HEADERS, rows))
        raw["shares"][name] = {
            f"{density:g}": {kind: binned(c, edges) for kind, c in pooled(ages)._asdict().items()}
            for density, ages in by_density.items()
        }
    about = (
        f"Steps since an entry was last sent by the same rank, or since the start: {WORKERS} workers simulated in one "
        f"process, {steps:,} steps, {seeds} seed{'s' if seeds > 1 else ''}, DGCConfig's defaults and the task's "
        "clipping, no warm-up of density. In brackets: lowest and highest of ranks and seeds."
    )
    (title, headers, first), *more = tables
    report("staleness", f"{about}\n\n{title}", headers, first, raw, more, folder)


def main() -> None:
    """Trains, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TRAINED, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=1, help="of weights and samples, counted from 0; default: 1")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run; default: {STEPS}")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time; default: one a core")
    parser.add_argument("--folder", type=Path, default=RESULTS, help=f"of the report; default: {RESULTS}")
    args = parser.parse_args()
    runs = [
        Run(task, density, seed, args.steps)
        for seed in range(args.seeds)
        for task in args.tasks
        for density in DENSITIES
    ]
    found: dict[str, dict[float, list[Ages]]] = {task: {density: [] for density in DENSITIES} for task in args.tasks}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for run, ages in zip(runs, tqdm(pool.map(perform, runs), total=len(runs), unit="run"), strict=True):
            found[run.task][run.density] += ages
    tell(found, args.seeds, args.steps, args.folder)


if __name__ == "__main__":
    main()
