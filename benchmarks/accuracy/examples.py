"""The examples of models that change, dense and with DGC: accuracy and bytes, over seeds.

    python -m benchmarks.accuracy.examples

Each of the six runs on two CPU processes, with --dense and without, for every seed. With --quick and DGC a run took at
most 94 seconds on two cores, which were shared: gan 94, block_sparse 74, lottery_ticket 38, rigl 21 (SET 26),
reversible_lm and progressive less than a minute. Finished runs are kept in results/examples.jsonl, so that the table
can be gathered over several calls: --minutes says when to stop starting new ones.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.frameworks import TORCHRUN
from benchmarks.harness import RESULTS, ROOT, report

from .compare import interval
from .runs import Point, Record, Run, gather, options_of_each

EXAMPLES = ("rigl", "lottery_ticket", "progressive", "reversible_lm", "gan", "block_sparse")
RESULT = re.compile(r"(?:accuracy|score) ([0-9.]+) %, ([0-9,]+) bytes sent")
METHODS = ("dense", "DGC 1 %")
OWN = 0
"""Run.steps of an example's own number."""
SECONDS = 60
"""What a run is expected to take before one like it is finished."""
TARGET = {"rigl": -0.5, "lottery_ticket": -0.5}
"""Points that the lower end of the interval is to stay above."""


def perform(run: Run) -> list[Point]:
    """Runs an example: steps, accuracy in per cent, and the bytes that a rank has sent.

    Raises:
        RuntimeError: it failed, or printed no result.
    """
    length = {"own": [], "--quick": ["--quick"]}[run.settings]
    steps = [] if run.steps == OWN else ["--steps", str(run.steps)]
    dense = ["--dense"] if run.method == "dense" else []
    command = [sys.executable, *TORCHRUN, f"examples/{run.task}.py", "--seed", str(run.seed), *length, *steps, *dense]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = RESULT.search(result.stdout)
    if result.returncode or not found:
        raise RuntimeError(f"{' '.join(command)}: expected a result, got {result.stdout[-500:]}{result.stderr[-2000:]}")
    return [(run.steps, float(found[1]), int(found[2].replace(",", "")))]


def expected(left: Sequence[Run], done: Mapping[Run, Record]) -> float:
    """Returns the seconds that runs will take, by those of the same example."""
    like = {run.task: [r.seconds for r in done.values() if r.run.task == run.task] for run in left}
    return sum(statistics.median(like[run.task] or [SECONDS]) for run in left)


def row(name: str, dense: Sequence[Record], ours: Sequence[Record]) -> list[str]:
    """Returns a row of the table: mean accuracies, their differences seed by seed, and bytes of a run in MB."""
    difference = interval([b.score - a.score for a, b in zip(dense, ours, strict=True)])
    means = [f"{statistics.fmean(r.score for r in runs):.2f} %" for runs in (dense, ours)]
    spread = f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"
    if name in TARGET:
        spread += ", reached" if difference.low > TARGET[name] else ", NOT REACHED"
    megabytes = [f"{statistics.fmean(r.curve[-1][2] for r in runs) / 1e6:,.1f}" for runs in (dense, ours)]
    return [name, str(len(dense)), *means, spread, *megabytes]


def main() -> None:
    """Does the runs, and reports."""
    parser = options_of_each(__doc__, EXAMPLES, RESULTS / "examples.jsonl", seeds=5)
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    args = parser.parse_args()
    settings = "--quick" if args.quick else "own"
    steps = args.steps or OWN
    runs = [
        Run(task, method, seed, steps, settings)
        for task in args.tasks
        for seed in range(args.seeds)
        for method in METHODS
    ]
    done = gather(runs, perform, args.file, 1, args.minutes, expected)
    rows: list[list[str]] = []
    raw: dict[str, Any] = {"commits of the runs": sorted({r.commit for r in done.values()})}
    for task in args.tasks:
        dense, ours = (
            {r.run.seed: r for run, r in done.items() if (run.task, run.method) == (task, method)} for method in METHODS
        )
        seeds = sorted(dense.keys() & ours.keys())
        if len(seeds) < 2:
            print(f"{task}: expected at least two seeds, dense and DGC, got {len(seeds)}: no row")
            continue
        raw[task] = {
            method: [of[seed].score for seed in seeds] for method, of in zip(METHODS, (dense, ours), strict=True)
        }
        rows.append(row(task, [dense[seed] for seed in seeds], [ours[seed] for seed in seeds]))
    report(
        "examples",
        f"The examples of models that change, on two processes{', --quick' if args.quick else ''}: mean accuracy on "
        "data not trained on, and the difference of the same seeds in points (95 % interval; to stay above "
        f"{TARGET['rigl']} for rigl and lottery_ticket). MB: what a rank sends in the whole run, warm-up included; "
        "dense as a ring all-reduce.",
        ["example", "seeds", "dense", "DGC, 1 %", "difference", "MB, dense", "MB, DGC"],
        rows,
        raw,
        folder=args.file.parent,
    )


if __name__ == "__main__":
    main()
