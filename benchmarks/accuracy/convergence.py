"""Accuracy at equal steps: DGC against dense training, several seeds, small tasks on real data.

    python -m benchmarks.accuracy.convergence

Four workers, simulated in one process by the package's own core (see replicas.py). Dense and DGC have the same recipe,
learning rate included, the same weights at the start and the same samples; a difference is that of one seed's pair.
Learning rates were chosen for dense training, on another seed. Finished runs are kept in results/convergence.jsonl, so
that the table can be gathered over several calls: --minutes says when to stop starting new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dgc
from benchmarks.harness import RESULTS, Table

from .compare import HEADERS, Difference, draw, publish, reaches, table
from .replicas import DGC, WORKERS, Dense, train
from .runs import Record, Run, gather, options, told
from .tasks import TASKS, Task

TRAINED = [name for name, task in TASKS.items() if task.optimizer == "SGD"]
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "DGC 5 %": {"density": 0.05},
    "DGC 5 %, masked": {"density": 0.05, "momentum_masking": True},
    "DGC 1 %": {"density": 0.01},
    "DGC 1 %, long warm-up": {"density": 0.01, "warmup": 2},
    "DGC 0.1 %": {"density": 0.001},
    "DGC 0.1 %, long warm-up": {"density": 0.001, "warmup": 2},
    "DGC 0.1 %, at least 32": {"density": 0.001, "min_entries": 32},
    "DGC 0.1 %, one selection": {"density": 0.001, "selection": "global"},
    "DGC 0.1 %, one selection, long warm-up": {"density": 0.001, "selection": "global", "warmup": 2},
    "DGC 0.1 %, one selection of at least 32": {"density": 0.001, "selection": "global", "min_entries": 32},
    "DGC 0.1 %, 8 bits": {"density": 0.001, "wire_dtype": "8bit", "dense_wire_dtype": "bfloat16"},
}
"""Arguments of DGCConfig, besides the task's clipping; warmup: over which part of the run, a tenth (10) or half (2)."""
FOR_LANGUAGE = ("DGC 5 %", "DGC 5 %, masked", "DGC 1 %, long warm-up", "DGC 0.1 %, long warm-up")
"""Those that are tried where 0.1 % falls short, in search of a better setting."""
FOR_GPT = tuple(name for name in METHODS if "one selection" in name or "at least 32" in name)
"""Those that are tried on the one task for which the ablation promised something of them."""


def methods(task: Task) -> list[str]:
    """Returns what is compared on a task."""
    return [
        name
        for name in METHODS
        if (task.momentum or "masked" not in name)
        and (task.metric == "perplexity" or name not in FOR_LANGUAGE)
        and (task is TASKS["gpt"] or name not in FOR_GPT)
    ]


def config(method: str, clip_norm: float | None, steps: int) -> dgc.DGCConfig | None:
    """Returns a method's configuration; None for dense."""
    arguments = METHODS[method]
    if arguments is None:
        return None
    given = {"warmup": 10, **arguments}
    return dgc.DGCConfig(warmup_steps=steps // given.pop("warmup"), clip_norm=clip_norm, **given)


def plan(tasks: Sequence[str], seeds: int, steps: int | None) -> list[Run]:
    """Returns all runs, seed after seed."""
    runs = []
    for seed in range(seeds):
        for name in tasks:
            task = TASKS[name]
            for method in methods(task):
                length = steps or task.steps
                settings = f"{task.recipe}, {told(config(method, task.clip_norm, length))}"
                runs.append(Run(name, method, seed, length, settings))
    return runs


def perform(run: Run) -> list[tuple[int, float]]:
    """Trains."""
    task = TASKS[run.task]
    chosen = config(run.method, task.clip_norm, run.steps)
    return train(task, Dense if chosen is None else partial(DGC, config=chosen), run.seed, run.steps)


def tell(tasks: Sequence[str], seeds: Sequence[int], records: Sequence[Record], folder: Path) -> None:
    """Writes tables, picture and raw figures."""
    tables: list[Table] = []
    found: dict[str, dict[str, Difference]] = {}
    steps = {r.run.task: r.run.steps for r in records}
    for name in tasks:
        task = TASKS[name]
        rows, found[name] = table(records, name, methods(task), "dense", seeds)
        for row in rows[1:]:
            row.append("yes" if reaches(name, found[name][row[0]]) else "no")
        title = f"**{name}**: {task.about}; {task.metric}. {task.recipe}, {steps[name]:,} steps."
        tables.append((title, [*(h.format("dense") for h in HEADERS), "within 0.5 points or 1 %"], rows))
    draw(found, "dense", True, folder / "convergence.png")
    about = (
        f"Test accuracy (%, higher is better) and perplexity (lower is better) at the end: {WORKERS} workers simulated "
        f"in one process, seeds {seeds[0]} to {seeds[-1]}, warm-up over the first tenth "
        "(long: over half)."
    )
    publish("convergence", about, tables, found, records, folder)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    args = options(__doc__, TRAINED, RESULTS / "convergence.jsonl").parse_args()
    runs = plan(args.tasks, args.seeds, args.steps)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(args.tasks, range(args.seeds), [*found.values()], args.file.parent)


if __name__ == "__main__":
    main()
