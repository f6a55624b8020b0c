"""Fine-tuning under DGC: a GPT that was trained on the Old Testament goes on with the New, several seeds.

    python -m benchmarks.accuracy.fine_tuning

The model is trained dense, or by DGC at 1 % without a warm-up. Then the learning rate starts again, lower, and training
goes on with the other text: dense or by DGC, with a warm-up of density or without, also with the moments of the first
training, and after DGC with the residual that was left of it. The lower learning rate is half of the first one: the
best of 0.5, 1, 2 and 4 thousandths for a dense fine-tuning on another seed, where 8, as at first, was 1.1 % better.

Workers, samples and seeds are convergence.py's, the rule is dgc.AdamW. A run does both trainings, so that it can be
done again from its line alone; runs of one seed that follow each other in a process share the first one. Finished runs
are kept in results/fine_tuning.jsonl: --minutes says when to stop starting new ones.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import dgc
from benchmarks.harness import RESULTS, Table

from .adam_variants import DENSE_BELOW, WARMUP, DenseAdamW
from .compare import HEADERS, draw, publish, reaches, table
from .data import new_testament, old_testament
from .replicas import DGC, WORKERS, follow
from .runs import Point, Record, Run, gather, options, told
from .tasks import TASKS, Task, measure
from .traffic import share_of_dense, shown

TASK = "gpt-adamw"
FIRST = replace(TASKS[TASK], load=old_testament)
SECOND = replace(TASKS[TASK], load=new_testament, lr=4e-3)
STEPS = 500
"""Of fine-tuning."""
LONGER = 2.5
"""Steps of the first training for each of fine-tuning."""
DENSITY = 0.01


@dataclass(frozen=True)
class Method:
    """How a model is fine-tuned, and which one."""

    first: Literal["dense", "DGC"] = "dense"
    """How it was trained."""
    second: Literal["dense", "DGC"] = "DGC"
    warmup: float = 0.0
    """Share of fine-tuning over which density falls."""
    keeps: Literal["nothing", "moments", "moments and residual"] = "nothing"
    """What the workers still have of the first training, besides the weights."""

    def config(self, steps: int) -> dgc.DGCConfig | None:
        """Returns the configuration of a fine-tuning of so many steps; None for a dense one."""
        return None if self.second == "dense" else config(round(self.warmup * steps))


REFERENCE, ANEW = "dense", "DGC's model: DGC 1 %"
METHODS = {
    REFERENCE: Method(second="dense"),
    "dense, old moments": Method(second="dense", keeps="moments"),
    "DGC 1 %": Method(),
    "DGC 1 %, warm-up": Method(warmup=0.3),
    "DGC 1 %, old moments": Method(keeps="moments"),
    "DGC's model: dense": Method("DGC", "dense"),
    ANEW: Method("DGC"),
    "DGC's model: DGC 1 %, old moments": Method("DGC", keeps="moments"),
    "DGC's model: DGC 1 %, old moments and residual": Method("DGC", keeps="moments and residual"),
}


def config(warmup_steps: int = 0) -> dgc.DGCConfig:
    """Returns the configuration of both trainings."""
    return dgc.DGCConfig(DENSITY, warmup_steps, WARMUP, clip_norm=FIRST.clip_norm, dense_below=DENSE_BELOW)


def trainer_of(network: nn.Module, task: Task, chosen: dgc.DGCConfig | None) -> DenseAdamW | DGC:
    """Returns what trains a copy of a network."""
    network = copy.deepcopy(network)
    return DenseAdamW(network, task) if chosen is None else DGC(network, task, chosen)


@lru_cache(maxsize=2)
def trained(first: Literal["dense", "DGC"], seed: int, steps: int) -> DenseAdamW | DGC:
    """Returns workers after the first training; they are not to be changed."""
    torch.manual_seed(seed)
    trainer = trainer_of(FIRST.network(), FIRST, None if first == "dense" else config())
    follow(FIRST, trainer, seed, steps)
    return trainer


def take_over(trainer: DenseAdamW | DGC, before: DenseAdamW | DGC, residual: bool) -> None:
    """Gives each worker the moments that it had at the end of another training, and the residual if it is to have it.

    The learning rate stays the new one. A dense training has moments of all workers, and no residual.
    """
    for optimizer, old in zip(trainer.optimizers, cycle(before.optimizers), strict=False):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(old.state_dict()["state"])})
    if isinstance(trainer, DGC) and isinstance(before, DGC):
        for state, old_state in zip(trainer.states, before.states, strict=True):
            state.load_state_dict(copy.deepcopy(old_state.state_dict()))
            if not residual:
                state.memory.residual.zero_()


def perform(run: Run) -> list[Point]:
    """Trains twice, and returns the metric on the second text from before fine-tuning to its end."""
    method = METHODS[run.method]
    before = trained(method.first, run.seed, round(LONGER * run.steps))
    trainer = trainer_of(before.network, SECOND, method.config(run.steps))
    if method.keeps != "nothing":
        take_over(trainer, before, residual=method.keeps == "moments and residual")
    return [(0, measure(SECOND, trainer.network)), *follow(SECOND, trainer, run.seed, run.steps)]


def plan(seeds: int, steps: int) -> list[Run]:
    """Returns all runs, seed after seed."""
    runs = []
    for seed in range(seeds):
        for name, method in METHODS.items():
            first = told(None if method.first == "dense" else config())
            settings = (
                f"Old Testament: {FIRST.recipe}, {round(LONGER * steps):,} steps, {first}; "
                f"New Testament: {SECOND.recipe}, {told(method.config(steps))}, keeps {method.keeps}"
            )
            runs.append(Run(TASK, name, seed, steps, settings))
    return runs


def traffic_of(method: str, steps: int) -> str:
    """Returns what a method sends in fine-tuning, as the table shows it."""
    chosen = METHODS[method].config(steps)
    return shown(1.0 if chosen is None else share_of_dense(SECOND.network(), chosen, steps, WORKERS))


def tell(seeds: Sequence[int], records: Sequence[Record], folder: Path) -> None:
    """Writes tables, picture and raw figures."""
    steps = records[0].run.steps
    rows, found = table(records, TASK, METHODS, REFERENCE, seeds)
    for row in rows:
        method = row[0]
        before = statistics.fmean(r.curve[0][1] for r in records if r.run.method == method and r.run.seed in seeds)
        row.insert(1, f"{before:.1f}")
        row += ["" if method == REFERENCE else "yes" if reaches(TASK, found[method]) else "no"]
        row += [traffic_of(method, steps)]
    headers = [header.format(REFERENCE) for header in HEADERS]
    shown_headers = [headers[0], "before", *headers[1:], "surely less than 1 % worse", "bytes of dense"]
    kept = [name for name, method in METHODS.items() if method.first == method.second == "DGC"]
    title = (
        f"{SECOND.about.split(' on ')[0]}. First training: the Old Testament, {round(LONGER * steps):,} steps. "
        f"{FIRST.recipe}. Fine-tuning: the New Testament, {steps:,} steps, and the same but for lr {SECOND.lr:g}."
    )
    tables: list[Table] = [
        (title, shown_headers, rows),
        (
            "What was left of DGC's first training, against beginning anew with its weights.",
            [header.format("beginning anew") for header in HEADERS],
            table(records, TASK, kept, ANEW, seeds)[0],
        ),
    ]
    draw({TASK: found}, "a dense model that is fine-tuned dense", True, folder / "fine_tuning.png")
    about = (
        f"Perplexity (lower is better) on a tenth of the New Testament, before fine-tuning and at its end: {WORKERS} "
        f"workers simulated in one process, seeds {seeds[0]} to {seeds[-1]}. The model was trained dense, or by DGC at "
        "1 % (DGC's model). Moments begin at 0 but where they are the old ones. Warm-up: density falls from 6.25 % "
        "over 30 % of fine-tuning. Bytes: of fine-tuning, in parts of what DDP sends with float32 gradients."
    )
    publish("fine_tuning", about, tables, {TASK: found}, records, folder)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    args = options(__doc__, [TASK], RESULTS / "fine_tuning.jsonl").parse_args()
    runs = plan(args.seeds, args.steps or STEPS)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(range(args.seeds), [*found.values()], args.file.parent)


if __name__ == "__main__":
    main()
