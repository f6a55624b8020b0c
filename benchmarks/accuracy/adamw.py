"""AdamW under DGC against dense AdamW at equal steps: small transformers on real data, several seeds.

    python -m benchmarks.accuracy.adamw

Workers, samples and seeds are convergence.py's, the rule is dgc.AdamW in the package's own core. Dense and DGC have the
same recipe, learning rate included; it was chosen for dense training, on another seed. Each method also says what it
sends over the whole run, warm-up and dense tensors included. Finished runs are kept in results/adamw.jsonl, so that the
table can be gathered over several calls: --minutes says when to stop starting new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dgc
from benchmarks.harness import RESULTS, Table

from .adam_variants import DENSE_BELOW, WARMUP, DenseAdamW
from .compare import HEADERS, Difference, draw, publish, reaches, table
from .replicas import DGC, WORKERS, train
from .runs import Record, Run, gather, options, told
from .tasks import TASKS, Task
from .traffic import share_of_dense, shown

TRAINED = [name for name, task in TASKS.items() if task.optimizer == "AdamW"]
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "DGC 1 %": {"density": 0.01, "warmup": 0.3},
    "DGC 0.1 %": {"density": 0.001, "warmup": 0.5},
    "DGC 1 %, no warm-up": {"density": 0.01, "warmup": 0.0},
    "DGC 0.1 %, no warm-up": {"density": 0.001, "warmup": 0.0},
}
"""Arguments of DGCConfig, besides those that all have; warmup: the part of the run over which density falls."""
OF_TASK = {
    "vit-adamw": ["dense", "DGC 1 %, no warm-up"],
    "gpt2-adamw": ["dense", "DGC 1 %, no warm-up"],
}
"""The methods of a task; of the others all."""
MORE_SEEDS = {"vit-adamw": 2}
"""How many times as many seeds a task has: its test images are few."""


def config(method: str, task: Task, steps: int) -> dgc.DGCConfig | None:
    """Returns a method's configuration; None for dense."""
    arguments = METHODS[method]
    if arguments is None:
        return None
    return dgc.DGCConfig(
        arguments["density"],
        round(arguments["warmup"] * steps),
        WARMUP,
        clip_norm=task.clip_norm,
        dense_below=DENSE_BELOW,
    )


def plan(tasks: Sequence[str], seeds: int, steps: int | None) -> list[Run]:
    """Returns all runs, seed after seed."""
    runs = []
    for seed in range(seeds * max(MORE_SEEDS.values())):
        for name in tasks:
            if seed >= seeds * MORE_SEEDS.get(name, 1):
                continue
            task = TASKS[name]
            length = steps or task.steps
            runs += [
                Run(name, method, seed, length, f"{task.recipe}, {told(config(method, task, length))}")
                for method in OF_TASK.get(name, METHODS)
            ]
    return runs


def perform(run: Run) -> list[tuple[int, float]]:
    """Trains."""
    task = TASKS[run.task]
    chosen = config(run.method, task, run.steps)
    return train(task, DenseAdamW if chosen is None else partial(DGC, config=chosen), run.seed, run.steps)


def traffic_of(task: Task, method: str, steps: int) -> str:
    """Returns what a method sends, as the table shows it."""
    chosen = config(method, task, steps)
    return shown(1.0 if chosen is None else share_of_dense(task.network(), chosen, steps, WORKERS))


def tell(tasks: Sequence[str], seeds: Sequence[int], records: Sequence[Record], folder: Path) -> None:
    """Writes tables, picture and raw figures."""
    tables: list[Table] = []
    found: dict[str, dict[str, Difference]] = {}
    steps = {r.run.task: r.run.steps for r in records}
    for name in tasks:
        task = TASKS[name]
        own = range(len(seeds) * MORE_SEEDS.get(name, 1))
        rows, found[name] = table(records, name, OF_TASK.get(name, METHODS), "dense", own)
        for row in rows:
            method = row[0]
            within = "" if method == "dense" else "yes" if reaches(name, found[name][method]) else "no"
            row += [within, traffic_of(task, method, steps[name])]
        title = f"**{name}**: {task.about}; {task.metric}. {task.recipe}, {steps[name]:,} steps, {len(own)} seeds."
        headers = [*(h.format("dense") for h in HEADERS), "within 0.5 points or 1 %", "bytes of dense"]
        tables.append((title, headers, rows))
    draw(found, "dense AdamW", True, folder / "adamw.png")
    about = (
        f"Test perplexity (lower is better), or accuracy (%, higher is better), at the end: {WORKERS} "
        "workers simulated in one process, seeds counted from 0. Density falls from 6.25 % in equal "
        "phases, over 30 % of the run to 1 %, over half to 0.1 %. Bytes: of the whole run, in parts of what DDP sends "
        "with float32 gradients."
    )
    publish("adamw", about, tables, found, records, folder)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    args = options(__doc__, TRAINED, RESULTS / "adamw.jsonl").parse_args()
    runs = plan(args.tasks, args.seeds, args.steps)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(args.tasks, range(args.seeds), [*found.values()], args.file.parent)


if __name__ == "__main__":
    main()
