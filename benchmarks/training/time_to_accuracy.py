"""Seconds, bytes and steps to a test accuracy or perplexity, in whole trainings on 100 Mbit/s, 1 Gbit/s and 10 Gbit/s.

    sudo python -m benchmarks.training.time_to_accuracy
    sudo python -m benchmarks.training.time_to_accuracy --tasks gpt-adamw --rates 1gbit 100mbit --minutes 20

Ranks and links are those of network.py, tasks and recipes those of benchmarks/accuracy/tasks.py, as they were chosen
for dense training on one process; trainings.py says what is in the time. A run ends at its target, which dense training
reaches long before its learning rate has fallen. Where the target is met is read off the straight line between two
evaluations. One that misses it within --steps is reported with what it had. Runs go one at a time.

- `ddp`: plain DDP, float32, and torch's own optimizer, fused.     `ddp bf16`: with PyTorch's bf16_compress_hook.
- `powersgd`: with PyTorch's powerSGD_hook at rank 4, from the second step on; its default starts at step 1,000.
- `dgc`: this package at 1 %, with the default densities of warm-up over the first tenth of --steps.
- `dgc, no warm-up`: at 1 % from the first step on.     `dgc auto`: the same with exchange="auto".

Finished runs are kept in results/time_to_accuracy.jsonl, so that the tables can be gathered over several calls:
--minutes says when to stop starting new ones. The report comes once all that were asked for are there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.accuracy.runs import Record, Run, gather, options_of_each
from benchmarks.accuracy.tasks import TASKS
from benchmarks.harness import RESULTS, keep_freed_memory, result_name

from .links import namespaces
from .links.report_time import Setting, report_time
from .trainings import METHODS, RIVALS, UNLIMITED, Training, perform, settings

RATES = ("100mbit", "1gbit", "10gbit")


@dataclass(frozen=True)
class Goal:
    """How long a task is trained, and to what."""

    steps: int
    target: float
    every: int
    """Steps from one evaluation to the next."""
    usual: int
    """Steps that dense training of two ranks takes, about."""
    step: float
    """Seconds of a step of two ranks without exchange, about, on two cores."""
    samples: int | None = None
    """Of the test samples, those that are evaluated; None for all."""


GOALS = {
    "mnist": Goal(steps=1000, target=96.5, every=20, usual=300, step=0.006),
    "gpt-adamw": Goal(steps=3000, target=60.0, every=50, usual=1200, step=0.008),
    "gpt-4.5M": Goal(steps=738, target=85.0, every=50, usual=430, step=0.07, samples=250),
}
"""By task."""
SHARE = {"ddp": 1.0, "ddp bf16": 0.5}
"""What a method sends of float32 gradients; others about a tenth, warm-up included."""
START_UP = 12  # seconds of a run besides its steps: processes, data, evaluations


def training(task: str, rate: str, ranks: int, method: str, seed: int, args: argparse.Namespace) -> Training:
    """Returns a run."""
    goal = GOALS[task]
    steps = args.steps or goal.steps
    about = settings(method, TASKS[task], steps)
    target = args.target.get(task, goal.target)
    return Training(task, method, seed, steps, about, rate, ranks, target, goal.every, goal.samples)


def plan(args: argparse.Namespace) -> list[Training]:
    """Returns all runs, seed after seed."""
    return [
        training(task, rate, ranks, method, seed, args)
        for seed in range(args.seeds)
        for ranks in args.ranks
        for task in args.tasks
        for rate in args.rates
        for method in args.methods
    ]


def expected(left: Sequence[Run], done: Mapping[Run, Record]) -> float:
    """Returns the seconds that runs will take: those of the same run with other seeds, else by the bytes of DDP."""
    return sum(_expected(run, done) for run in left if isinstance(run, Training))


def _expected(run: Training, done: Mapping[Run, Record]) -> float:
    like = [record.seconds for other, record in done.items() if replace(other, seed=run.seed) == run]
    if like:
        return statistics.median(like)
    goal = GOALS[run.task]
    whole = 32 * sum(p.numel() for p in TASKS[run.task].network().parameters()) * 2 * (run.ranks - 1) / run.ranks
    link = 0.0 if run.rate == UNLIMITED else SHARE.get(run.method, 0.1) * whole / namespaces.bits(run.rate)
    return START_UP + min(goal.usual, run.steps) * (goal.step * max(1, run.ranks / 2) + link)


def compared(args: argparse.Namespace, found: Mapping[Run, Record]) -> list[Setting]:
    """Returns all methods' curves, a setting for each task, rate and number of ranks."""
    result = []
    for ranks in args.ranks:
        for task in args.tasks:
            for rate in args.rates:
                runs = {m: [training(task, rate, ranks, m, s, args) for s in range(args.seeds)] for m in args.methods}
                curves = {method: [found[run].curve for run in of] for method, of in runs.items()}
                first = runs[args.methods[0]][0]
                about = f"{TASKS[task].about}; {TASKS[task].recipe}, at most {first.steps:,} steps"
                result.append(Setting(task, rate, ranks, about, TASKS[task].metric, first.target, curves))
    return result


def tell(args: argparse.Namespace, found: Mapping[Run, Record]) -> None:
    """Writes tables, picture and raw figures."""
    every = ", ".join(f"{GOALS[task].every} steps ({task})" for task in args.tasks)
    about = (
        f"Whole trainings to a target, seeds 0 to {args.seeds - 1} one after the other: seconds of the slowest rank, "
        f"evaluations (every {every}, on rank 0) and start not counted; bytes: of frames that leave a rank, counted by "
        "the kernel. dgc at 1 %, its warm-up over the first tenth of the most steps. Ratios: by seed, median (lowest "
        "to highest)."
    )
    raw = {
        "commits of the runs": sorted({record.commit for record in found.values()}),
        "settings": {
            method: {task: settings(method, TASKS[task], args.steps or GOALS[task].steps) for task in args.tasks}
            for method in args.methods
        },
    }
    report_time(args.out, about, compared(args, found), RIVALS, raw, args.file.parent)


def target_of(text: str) -> tuple[str, float]:
    """Returns task and target of a text such as mnist=97.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    task, _, number = text.partition("=")
    try:
        target = float(number)
    except ValueError:
        target = math.nan
    if task not in GOALS or not (math.isfinite(target) and target > 0):
        raise argparse.ArgumentTypeError(f"expected a task ({', '.join(GOALS)}) = a number, got {text!r}")
    return task, target


def parsed() -> argparse.Namespace:
    """Returns the command line's settings."""
    parser = options_of_each(__doc__, list(GOALS), RESULTS / "time_to_accuracy.jsonl", seeds=3)
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="of each direction, as tc writes them")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--out", type=result_name, default="time_to_accuracy", help="name of the report (%(default)s)")
    usual = " ".join(f"{task}={goal.target:g}" for task, goal in GOALS.items())
    parser.add_argument("--target", nargs="+", type=target_of, default=[], help=f"default: {usual}")
    args = parser.parse_args()
    try:
        for rate in args.rates:
            namespaces.bits(rate)
    except ValueError as error:
        parser.error(str(error))
    if missing := {*RIVALS} - {*args.methods}:
        parser.error(f"--methods: expected {' and '.join(RIVALS)} among them, without {', '.join(sorted(missing))}")
    if min(args.ranks) < 2 or args.seeds < 1 or (args.steps is not None and args.steps < 1):
        parser.error("expected --ranks >= 2, --seeds >= 1 and --steps >= 1")
    args.target = dict(args.target)
    return args


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    args = parsed()
    if missing := namespaces.missing():
        print(f"NO LIMITS: {missing}. All runs on an unlimited loopback; limits need root.", file=sys.stderr)
        args.rates = [UNLIMITED]
    keep_freed_memory()
    runs = plan(args)
    found = gather(runs, perform, args.file, 1, args.minutes, expected)
    if len(found) == len(runs):
        tell(args, found)


if __name__ == "__main__":
    main()
