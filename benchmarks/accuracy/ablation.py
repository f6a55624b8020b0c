"""Which of DGC's techniques does what: added one after another, taken out one at a time, and changed.

    python -m benchmarks.accuracy.ablation

The paper (section 4) has no such table. Workers, samples, recipe and seeds are convergence.py's, except that the GPT's
learning rate does not warm up: its first steps are rough, and that is where techniques differ. They are switches of
variants.py, in plain PyTorch. Density 0.1 %, parameters of one dimension dense. Finished runs are kept in
results/ablation.jsonl, so that the table can be gathered over several calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Table

from .compare import HEADERS, Difference, draw, publish, table
from .replicas import WORKERS, Dense, train
from .runs import Record, Run, gather, options, told
from .tasks import TASKS
from .variants import Technique, Variant

TRAINED = {"letters": TASKS["letters"], "gpt": replace(TASKS["gpt"], lr_warmup=0.0)}
CLIP_NORM, STEPS = 1.0, 1500
DENSE, PAPER = "dense", "+ warm-up (the paper's method)"
NOTHING: dict[str, Any] = {"residual": False, "correction": False, "masking": False}
ADDED: dict[str, dict[str, Any]] = {
    "top-k and nothing else": NOTHING,
    "+ residual (gradient dropping)": {**NOTHING, "residual": True},
    "+ momentum correction": {"masking": False},
    "+ masking": {},
    "+ clipping": {"clip_norm": CLIP_NORM},
    PAPER: {"clip_norm": CLIP_NORM, "warmup": True},
}
"""Arguments of Technique; warmup: over a tenth of the run."""
CHANGED: dict[str, dict[str, Any]] = {
    "without residual": {"residual": False},
    "without momentum correction": {"correction": False, "masking": False},
    "without masking": {"masking": False},
    "without clipping": {"clip_norm": None},
    "without warm-up": {"warmup": False},
    "masking below 1 % only": {"masking": "auto"},
    "dense below 16,384 elements": {"dense_below": 16384},
    "at least 32 entries a tensor": {"at_least": 32},
    "one selection over all tensors": {"one_selection": True},
    "units of 32 elements": {"unit": 32},
    "units of 32 elements, 1.36 times as many": {"unit": 32, "density": 0.00136},
    "step-ahead 0.5": {"ahead": 0.5},
    "step-ahead 1": {"ahead": 1.0},
    "our defaults": {"masking": "auto", "dense_below": 16384},
    "our defaults without masking": {"masking": False, "dense_below": 16384},
}
"""What differs from the paper's method. Without 31 of 32 indices, 1.36 times as many entries are as many bytes."""
SAME = {"without warm-up": "+ clipping"}
"""Methods that are another one under a second name."""


def technique(method: str, steps: int) -> Technique:
    """Returns a method's switches."""
    chosen = ADDED[method] if method in ADDED else {**ADDED[PAPER], **CHANGED[method]}
    warmup = chosen.get("warmup", False)
    arguments = {name: value for name, value in chosen.items() if name != "warmup"}
    return Technique(**arguments, warmup_steps=steps // 10 if warmup else 0)


def plan(tasks: Sequence[str], seeds: int, steps: int | None) -> list[Run]:
    """Returns all runs, seed after seed."""
    runs = []
    for seed in range(seeds):
        for name in tasks:
            length = steps or STEPS
            for method in [DENSE, *ADDED, *(m for m in CHANGED if m not in SAME)]:
                switches = "" if method == DENSE else f", {told(technique(method, length))}"
                runs.append(Run(name, method, seed, length, TRAINED[name].recipe + switches))
    return runs


def perform(run: Run) -> list[tuple[int, float]]:
    """Trains."""
    chosen = Dense if run.method == DENSE else partial(Variant, technique=technique(run.method, run.steps))
    return train(TRAINED[run.task], chosen, run.seed, run.steps)


def tell(tasks: Sequence[str], seeds: Sequence[int], records: Sequence[Record], folder: Path) -> None:
    """Writes tables, picture and raw figures."""
    tables: list[Table] = []
    found: dict[str, dict[str, Difference]] = {}
    twins = [
        Record(Run(r.run.task, name, r.run.seed, r.run.steps, r.run.settings), r.curve, r.seconds, r.commit)
        for name, other in SAME.items()
        for r in records
        if r.run.method == other
    ]
    records = [*records, *twins]
    for name in tasks:
        task = TRAINED[name]
        about = f"{task.about}; {task.metric}. {task.recipe}, {records[0].run.steps:,} steps"
        added, found[name] = table(records, name, [DENSE, *ADDED], DENSE, seeds)
        changed, _ = table(records, name, [PAPER, *CHANGED], PAPER, seeds)
        found[name] |= table(records, name, CHANGED, DENSE, seeds)[1]
        tables.append((f"**{name}**, one technique after another: {about}.", _headers("dense"), added))
        tables.append((f"**{name}**, changes of the paper's method.", _headers("the paper's"), changed))
    draw(found, DENSE, False, folder / "ablation.png")
    about = (
        f"Test accuracy (%, higher is better) and perplexity (lower is better) at the end: {WORKERS} workers simulated "
        f"in one process, density 0.1 %, seeds {seeds[0]} to {seeds[-1]}. Clipping: at {CLIP_NORM:g}; warm-up: over "
        "the first tenth. Without momentum correction the optimizer applies momentum to the sparse average."
    )
    publish("ablation", about, tables, found, records, folder)


def _headers(reference: str) -> list[str]:
    return [header.format(reference) for header in HEADERS]


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    args = options(__doc__, list(TRAINED), RESULTS / "ablation.jsonl").parse_args()
    runs = plan(args.tasks, args.seeds, args.steps)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(args.tasks, range(args.seeds), [*found.values()], args.file.parent)


if __name__ == "__main__":
    main()
