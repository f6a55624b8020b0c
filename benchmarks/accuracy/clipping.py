"""Whether local clipping keeps a recurrent network with momentum from diverging: an LSTM on spoken vowels.

    python -m benchmarks.accuracy.clipping

The paper (section 3.2) clips each worker's gradient, before it accumulates, at 1 / sqrt(workers) of the threshold; it
does so for recurrent networks, and has no figure of what it brings. Here each exchange is trained with clipping and
without, at the task's own learning rate and at 20 and 40 times that, where dense training needs clipping too.

Workers, samples and seeds are convergence.py's. DGC is the paper's (masking always, a warm-up over a tenth of the run,
all matrices compressed), by the switches of variants.py. Finished runs are kept in results/clipping.jsonl, so that the
table can be gathered over several calls. It takes the package aeon, which has the recordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, Table

from .compare import HEADERS, Difference, draw, publish, scores, table
from .replicas import WORKERS, Dense, train
from .runs import Record, Run, gather, options
from .tasks import TASKS, Task
from .variants import Technique, Variant

TASK, STEPS = "vowels", 1500
TRAINED = [TASK]
FAILED = 90.0
"""Accuracy in per cent; a run that ends below has failed. At its own learning rate the task ends at about 97."""
EXCHANGES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "DGC 1 %": {"density": 0.01},
    "DGC 0.1 %": {},
    "DGC 0.1 %, no masking": {"masking": False},
    "DGC 0.1 %, no momentum correction": {"correction": False, "masking": False},
}
"""Arguments of Technique, besides clipping and warm-up."""
OWN = TASKS[TASK].lr
WHOLE = ["dense", "DGC 1 %", "DGC 0.1 %"]
RATES = {OWN: WHOLE, 20 * OWN: WHOLE, 40 * OWN: [*EXCHANGES]}
"""Which exchanges are tried at which learning rate."""


class Method(NamedTuple):
    """One way to train the task."""

    exchange: str
    lr: float
    clipped: bool

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"{self.exchange}, {'clipped' if self.clipped else 'not clipped'}, lr {self.lr:g}"

    @property
    def task(self) -> Task:
        """The task at its learning rate. Dense training clips the average where the task does."""
        task = TASKS[TASK]
        return replace(task, lr=self.lr, clip_norm=task.clip_norm if self.clipped else None)

    def technique(self, steps: int) -> Technique | None:
        """Returns the switches of a run of so many steps; None for dense."""
        switches = EXCHANGES[self.exchange]
        if switches is None:
            return None
        return Technique(clip_norm=self.task.clip_norm, warmup_steps=steps // 10, **switches)


METHODS = {
    method.name: method
    for lr, exchanges in RATES.items()
    for exchange in exchanges
    for clipped in (True, False)
    for method in [Method(exchange, lr, clipped)]
}
"""By name; the first of each learning rate is dense and clipped."""


def plan(tasks: Sequence[str], seeds: int, steps: int | None) -> list[Run]:
    """Returns all runs, seed after seed."""
    length = steps or STEPS
    return [
        Run(task, name, seed, length, f"{method.task.recipe}, {method.technique(length)}")
        for seed in range(seeds)
        for task in tasks
        for name, method in METHODS.items()
    ]


def perform(run: Run) -> list[tuple[int, float]]:
    """Trains."""
    method = METHODS[run.method]
    technique = method.technique(run.steps)
    chosen = Dense if technique is None else partial(Variant, technique=technique)
    return train(method.task, chosen, run.seed, run.steps)


def tell(seeds: Sequence[int], records: Sequence[Record], folder: Path) -> None:
    """Writes tables, picture and raw figures."""
    tables: list[Table] = []
    found: dict[str, Difference] = {}
    for lr in RATES:
        names = [name for name, method in METHODS.items() if method.lr == lr]
        rows, differences = table(records, TASK, names, names[0], seeds)
        for row in rows:
            ends = scores(records, TASK, row[0], seeds)
            row += [f"{min(ends):.2f}", f"{sum(end < FAILED for end in ends)} of {len(ends)}"]
        found |= differences
        headers = [*(header.format("dense, clipped") for header in HEADERS), "lowest", f"below {FAILED:g} %"]
        tables.append((f"**Learning rate {lr:g}**.", headers, rows))
    draw({TASK: found}, "dense with clipping, at the same learning rate", False, folder / "clipping.png")
    task = TASKS[TASK]
    about = (
        f"Test accuracy (%) at the end: {task.about}. {task.recipe}, or its learning rate as the table says; "
        f"{records[0].run.steps:,} steps. {WORKERS} workers simulated in one process, seeds {seeds[0]} to {seeds[-1]}. "
        f"Clipped: dense the average at {task.clip_norm:g}, DGC each worker's gradient at sqrt({WORKERS}) times that."
    )
    publish("clipping", about, tables, {TASK: found}, records, folder)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    args = options(__doc__, TRAINED, RESULTS / "clipping.jsonl").parse_args()
    runs = plan(args.tasks, args.seeds, args.steps)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(range(args.seeds), [*found.values()], args.file.parent)


if __name__ == "__main__":
    main()
