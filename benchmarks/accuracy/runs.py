"""Many training runs: side by side, one JSON line for each that is finished, and on from there the next time."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from benchmarks.harness import printed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Point = tuple[float, ...]
"""Step and metric, and what else a program has noted then."""


@dataclass(frozen=True)
class Run:
    """One training run: what it depends on. A program that varies more has fields of its own besides."""

    task: str
    method: str
    seed: int
    steps: int
    settings: str
    """All else: recipe and configuration. A run whose settings have changed since is done again."""


@dataclass(frozen=True)
class Record:
    """What came of a run."""

    run: Run
    curve: Sequence[Point]
    """The last one at the end."""
    seconds: float
    commit: str

    @property
    def score(self) -> float:
        """The metric at the end: accuracy in per cent, or perplexity."""
        return self.curve[-1][1]


def read(path: Path, kind: type[Run] = Run) -> dict[Run, Record]:
    """Returns the finished runs of a file, all of one kind."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    found = [Record(kind(**r["run"]), [(*point,) for point in r["curve"]], r["seconds"], r["commit"]) for r in records]
    return {record.run: record for record in found}


def told(config: DataclassInstance | None) -> str:
    """Returns the fields of a configuration that are not its class's defaults, for Run.settings; "dense" for None.

    So a finished run is found again when the class has a new field. Where a default changes, its runs are to be removed
    from the files, since they are found again too.
    """
    if config is None:
        return "dense"
    defaults = type(config)()
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    changed = [f"{name}={value!r}" for name, value in values.items() if value != getattr(defaults, name)]
    return f"{type(config).__name__}({', '.join(changed)})"


def gather(
    runs: Sequence[Run],
    perform: Callable[[Run], Sequence[Point]],
    path: Path,
    processes: int,
    minutes: float,
    expected: Callable[[Sequence[Run], Mapping[Run, Record]], float] | None = None,
) -> dict[Run, Record]:
    """Does the runs that a file does not have yet, and adds them to it as they finish.

    Args:
        runs: in the order in which to do them, all of one kind.
        perform: does one, in a process of its own.
        path: of the file, a JSON line for each run.
        processes: how many runs at a time, each on one thread.
        minutes: after which no further run is started.
        expected: the seconds that runs will take, by those that are finished; None: what like runs took, or short ones.

    Returns:
        All of `runs` that are finished.
    """
    done = read(path, type(runs[0]) if runs else Run)
    left = [run for run in runs if run not in done]
    commit = printed("git", "describe", "--always", "--dirty")
    end = time.monotonic() + 60 * minutes
    total = expected(left, done) if expected else _expected(left, perform, done)
    minutes_left = total / max(1, min(processes, os.cpu_count() or 1)) / 60
    rest = f" The {len(left)} others will take about {minutes_left:.0f} minutes, {processes} at a time." if left else ""
    print(f"{len(runs) - len(left)} of {len(runs)} runs are in {path.name}.{rest}")
    path.parent.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(left), unit="run") as bar,
        path.open("a") as file,
    ):
        under_way: dict[Future[tuple[Sequence[Point], float]], Run] = {}
        while left or under_way:
            while left and len(under_way) < processes and time.monotonic() < end:
                run = left.pop(0)
                under_way[pool.submit(_timed, perform, run)] = run
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                curve, seconds = future.result()
                record = Record(run, curve, seconds, commit)
                done[run] = record
                file.write(json.dumps(asdict(record)) + "\n")
                file.flush()
                bar.set_postfix_str(f"{run.task}, {run.method}: {record.score:.2f}")
                bar.update()
    if left:
        print(f"{len(left)} runs are left after {minutes:g} minutes: the same command goes on with them.")
    return {run: done[run] for run in runs if run in done}


def _timed(perform: Callable[[Run], Sequence[Point]], run: Run) -> tuple[Sequence[Point], float]:
    begin = time.perf_counter()
    return perform(run), time.perf_counter() - begin


def _expected(left: Sequence[Run], perform: Callable[[Run], Sequence[Point]], done: Mapping[Run, Record]) -> float:
    """Returns the seconds that the rest will take: by finished runs, else by a short one of each task."""
    seconds = {}
    torch.set_num_threads(1)
    for task in dict.fromkeys(run.task for run in left):
        like = [record.seconds / record.run.steps for record in done.values() if record.run.task == task]
        if not like:
            one = next(run for run in left if run.task == task)
            short = [replace(one, steps=steps) for steps in (5, 30)]
            few, many = (_timed(perform, run)[1] for run in short)
            like = [max(0.0, many - few) / 25 * 1.4]  # others do more than the first, and share the memory
        seconds[task] = statistics.median(like)
    return sum(seconds[run.task] * run.steps for run in left)


def options(description: str | None, tasks: Sequence[str], file: Path) -> argparse.ArgumentParser:
    """Returns the parser of what scripts whose runs go side by side can be told."""
    parser = options_of_each(description, tasks, file, seeds=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time; default: one a core")
    return parser


def options_of_each(description: str | None, tasks: Sequence[str], file: Path, seeds: int) -> argparse.ArgumentParser:
    """Returns the parser of what all scripts of runs can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, metavar="TASK", help=", ".join(tasks))
    parser.add_argument(
        "--seeds", type=int, default=seeds, help=f"of weights and samples, counted from 0; default: {seeds}"
    )
    parser.add_argument("--steps", type=int, help="of each run; default: the task's own, several thousand")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no further run is started")
    parser.add_argument(
        "--file", type=Path, default=file, help=f"of finished runs; the report goes to its folder; default: {file}"
    )
    return parser
