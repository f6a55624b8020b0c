"""Local steps against synchronous training and against dense DiLoCo, at equal numbers of inner steps.

    python -m benchmarks.accuracy.local_steps

Four islands of one worker, simulated in one process by dgc.LocalSteps itself, with AdamW inside (a small GPT) or SGD (a
CNN). All methods have the recipe of synchronous dense training, learning rate included, and each island clips its own
gradients. DiLoCo sends all, with Nesterov momentum on the mean; the others average plainly, and those that send less
than all do so in 8 bits a value. 3 % and 1 % are SparseLoCo's, whose residual decays by 0.95 in each round; at one H it
is also kept whole. H is the number of steps between two rounds. Finished runs are kept in results/local_steps.jsonl, so
that the table can be gathered over several calls: --minutes says when to stop starting new ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

import dgc
from benchmarks.harness import RESULTS, Table, report

from .adam_variants import DENSE_BELOW, DenseAdamW
from .compare import difference, paired, reaches, scores
from .replicas import WORKERS, Batch, Dense, InProcess, Meeting, Replica, Replicated, Trainer, copies_of, train
from .runs import Record, Run, gather, options, told
from .tasks import TASKS, Task, loss_of
from .traffic import share_of_dense, shown

TRAINED = ["gpt-adamw", "mnist"]
EVERY = (1, 5, 15, 50)
DENSE = "synchronous"
SPARSELOCO: dict[str, Any] = {"residual_decay": 0.95, "wire_dtype": "8bit"}
KEPT: dict[str, Any] = {"wire_dtype": "8bit", "warmup_densities": (0.25, 0.0625)}
KINDS: dict[str, dict[str, Any]] = {
    "DiLoCo": {"density": 1.0},
    "3 %": {"density": 0.03, **SPARSELOCO},
    "1 %": {"density": 0.01, **SPARSELOCO},
}
"""Arguments of DGCConfig; warmup: the part of the rounds over which density falls."""
AT = 15
MORE_KINDS: dict[str, dict[str, Any]] = {
    "all, averaged": {"density": 1.0},
    "3 %, no decay": {"density": 0.03, **KEPT},
    "3 %, no decay, warm-up": {"density": 0.03, "warmup": 0.25, **KEPT},
}
"""Those that are tried at H = AT alone."""


def methods(every: Sequence[int]) -> list[str]:
    """Returns what is compared, at some numbers of steps between two rounds."""
    kinds = {steps: {**KINDS, **(MORE_KINDS if steps == AT else {})} for steps in every}
    return [DENSE, *(f"H = {steps}, {kind}" for steps in every for kind in kinds[steps])]


@dataclass(frozen=True)
class Method:
    """What a run of local steps is."""

    every: int
    diloco: bool
    config: dgc.DGCConfig

    @classmethod
    def of(cls, name: str, steps: int) -> Method:
        """Reads a name of methods(), for a run of so many steps."""
        number, kind = name.removeprefix("H = ").split(", ", 1)
        arguments = {**KINDS, **MORE_KINDS}[kind]
        values = {key: value for key, value in arguments.items() if key != "warmup"}
        warmup = round(arguments.get("warmup", 0) * steps / int(number))
        return cls(int(number), kind == "DiLoCo", dgc.DGCConfig(warmup_steps=warmup, dense_below=DENSE_BELOW, **values))

    def local(self, replica: Replica[Optimizer], exchange: InProcess) -> dgc.LocalSteps:
        """Returns the rounds of one island."""
        outer = partial(dgc.OuterSGD, lr=0.7, momentum=0.9) if self.diloco else partial(dgc.SGD, lr=1.0)
        return dgc.LocalSteps(
            replica.network, replica.optimizer, self.config, every=self.every, outer=outer, exchange=exchange
        )


class Local(Replicated):
    """Four islands of one worker each."""

    def __init__(self, network: nn.Module, task: Task, method: Method, steps: int) -> None:
        """Makes replicas and their rounds.

        Args:
            network: at the start.
            task: with the recipe.
            method: of the outer exchange.
            steps: of the run, after which the islands finish.
        """
        self.task, self.method, self.left = task, method, steps
        self.replicas = [Replica(copy, _inner(copy, task)) for copy in copies_of(network)]
        meeting = Meeting()
        self.islands = [method.local(replica, InProcess(rank, meeting)) for rank, replica in enumerate(self.replicas)]
        self.threads = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))

    def reduce(self) -> None:
        """Clips each island's gradients by themselves."""
        if self.task.clip_norm is not None:
            for replica in self.replicas:
                nn.utils.clip_grad_norm_(replica.network.parameters(), self.task.clip_norm)

    def learn(self, batches: Sequence[Batch]) -> None:
        """Takes a step on each island; in a thread for each, since those that have sent wait for the others."""
        for replica, (inputs, targets) in zip(self.replicas, batches, strict=True):
            replica.optimizer.zero_grad()
            loss_of(replica.network(inputs), targets).backward()
        self.reduce()
        list(self.threads.map(lambda replica: replica.optimizer.step(), self.replicas))
        self.left -= 1
        if not self.left:
            list(self.threads.map(dgc.LocalSteps.finish, self.islands))
            self.threads.shutdown()


def _inner(network: nn.Module, task: Task) -> Optimizer:
    if task.optimizer == "AdamW":
        return torch.optim.AdamW(
            network.parameters(), lr=task.lr, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay
        )
    return torch.optim.SGD(network.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)


def plan(tasks: Sequence[str], every: Sequence[int], seeds: int, steps: int | None) -> list[Run]:
    """Returns all runs, seed after seed."""
    lengths = {name: steps or TASKS[name].steps for name in tasks}
    return [
        Run(name, method, seed, lengths[name], f"{TASKS[name].recipe}, {_settings(method, lengths[name])}")
        for seed in range(seeds)
        for name in tasks
        for method in methods(every)
    ]


def _settings(method: str, steps: int) -> str:
    if method == DENSE:
        return DENSE
    kind = Method.of(method, steps)
    return f"every {kind.every}, {'Nesterov momentum' if kind.diloco else 'plain averaging'}, {told(kind.config)}"


def perform(run: Run) -> list[tuple[int, float]]:
    """Trains."""
    task = TASKS[run.task]
    return train(task, partial(_trainer, name=run.method, steps=run.steps), run.seed, run.steps)


def _trainer(network: nn.Module, task: Task, name: str, steps: int) -> Trainer:
    if name == DENSE:
        return DenseAdamW(network, task) if task.optimizer == "AdamW" else Dense(network, task)
    return Local(network, task, Method.of(name, steps), steps)


def share(task: Task, name: str, steps: int) -> float:
    """Returns a method's bytes of a run over those of DDP with float32 gradients."""
    if name == DENSE:
        return 1.0
    method = Method.of(name, steps)
    return share_of_dense(task.network(), method.config, max(1, steps // method.every), WORKERS) / method.every


def rows_of(records: Sequence[Record], task: str, every: Sequence[int], seeds: Sequence[int]) -> list[list[Any]]:
    """Returns the rows of a task's table: each method against synchronous training and against DiLoCo at the same H."""
    rows: list[list[Any]] = []
    steps = next(r.run.steps for r in records if r.run.task == task)
    for method in methods(every):
        own = scores(records, task, method, seeds)
        spread = f"{statistics.stdev(own):.2f}" if len(own) > 1 else "one seed"
        row: list[Any] = [method, f"{statistics.fmean(own):.2f}", spread]
        diloco = f"{method.split(',')[0]}, DiLoCo"
        for reference in (DENSE, diloco):
            compared = method != DENSE and method != reference
            row.append(_difference(task, own, scores(records, task, reference, seeds)) if compared else "")
        within = ""
        if len(own) > 1 and method not in (DENSE, diloco):
            within = "yes" if reaches(task, difference(task, own, scores(records, task, diloco, seeds))) else "no"
        part = share(TASKS[task], method, steps)
        rows.append([*row, within, shown(part) if part >= 0.0005 else "under 0.05 %"])
    return rows


def _difference(task: str, own: Sequence[float], reference: Sequence[float]) -> str:
    unit = " %" if TASKS[task].metric == "perplexity" else ""
    if len(own) == 1:
        return f"{paired(task, own, reference)[0]:+.2f}{unit}"
    it = difference(task, own, reference)
    return f"{it.mean:+.2f}{unit} ({it.low:+.2f} to {it.high:+.2f})"


HEADERS = (
    "method",
    "mean",
    "SD",
    "difference to synchronous (95 %)",
    "difference to DiLoCo of this H (95 %)",
    "within 0.5 points or 1 % of it",
    "bytes of DDP",
)


def tell(
    tasks: Sequence[str], every: Sequence[int], seeds: Sequence[int], records: Mapping[Run, Record], folder: Path
) -> None:
    """Writes tables and raw figures."""
    found = [*records.values()]
    steps = {run.task: run.steps for run in records}
    tables: list[Table] = [
        (
            f"**{name}**: {TASKS[name].about}; {TASKS[name].metric}. {TASKS[name].recipe}, {steps[name]:,} steps.",
            HEADERS,
            rows_of(found, name, every, seeds),
        )
        for name in tasks
    ]
    about = (
        f"Test perplexity (lower is better) or accuracy (%, higher is better) at the end: {WORKERS} islands simulated "
        f"in one process, seeds {seeds[0]} to {seeds[-1]}. H: steps between two rounds."
    )
    (title, headers, first), *more = tables
    raw = {"commits of the runs": sorted({r.commit for r in found}), "seeds": [*seeds], "steps": steps}
    report("local_steps", f"{about}\n\n{title}", headers, first, raw, more, folder)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    parser = options(__doc__, TRAINED, RESULTS / "local_steps.jsonl")
    parser.add_argument("--every", nargs="+", type=int, default=list(EVERY), help="H; default: 1 5 15 50")
    args = parser.parse_args()
    runs = plan(args.tasks, args.every, args.seeds, args.steps)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(args.tasks, args.every, range(args.seeds), found, args.file.parent)


if __name__ == "__main__":
    main()
