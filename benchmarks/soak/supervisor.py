"""Starts the ranks, kills one of them now and then, and starts all of them again."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tqdm import tqdm

from .run import (
    HANGS,
    Run,
)
from .worker import saved, worker


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it."""

    rank: int
    progress: float
    """Of that rank when it died."""
    seconds: float
    """Until the last survivor had ended."""
    hung: int
    """Survivors that did not end by themselves."""
    resumed: int
    """After how many steps the checkpoint was from which all went on; 0 for the beginning."""
    error: str
    """What a survivor said."""


def plan_kills(run: Run) -> list[tuple[float, int]]:
    """Returns after which progress which rank is killed; every third one while it saves."""
    draw = random.Random(f"{run.seed} kills")
    steps = sorted(draw.sample(range(run.steps // 20, run.steps * 6 // 10), run.kills))
    ats = [
        max(1, step // run.save_every) * run.save_every + 0.5 if i % 3 == 1 else step for i, step in enumerate(steps)
    ]
    return [(at, draw.randrange(run.ranks)) for at in sorted(ats)]


def supervise(run: Run, folder: Path) -> list[Kill]:
    """Runs to the end, and returns the kills on the way.

    Raises:
        RuntimeError: a worker ended that nobody has killed.
    """
    context = get_context("forkserver")
    # A process then starts in less than a second; DDP imports torch._dynamo when it is made.
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "dgc"])
    progress = context.Array("d", run.ranks, lock=False)
    plan = plan_kills(run)
    kills: list[Kill] = []
    delays = random.Random(f"{run.seed} delays")
    resume = 0
    with tqdm(total=run.steps, desc="steps", file=sys.stderr) as bar:
        while True:
            attempt = len(kills)
            processes = [
                context.Process(target=worker, args=(rank, attempt, run, folder, resume, progress), daemon=True)
                for rank in range(run.ranks)
            ]
            for rank in range(run.ranks):
                progress[rank] = 0
            for process in processes:
                process.start()
            try:
                at, victim = plan[attempt] if attempt < len(plan) else (math.inf, 0)
                while any(process.is_alive() for process in processes):
                    if min(progress) >= bar.n + 1:  # replayed steps do not count again
                        bar.update(int(min(progress)) - bar.n)
                    if any(process.exitcode for process in processes):
                        break
                    if progress[victim] >= at:
                        time.sleep(delays.uniform(0, 0.02))  # anywhere in a step
                        break
                    time.sleep(0.005)
                if all(process.exitcode == 0 for process in processes):
                    bar.update(run.steps - bar.n)
                    return kills
                if progress[victim] < at:
                    codes = [process.exitcode for process in processes]
                    raise RuntimeError(f"a worker has ended, exit codes {codes}: {errors(folder, attempt)}")
                seconds, hung = strike(processes, victim)
            finally:
                for process in processes:
                    process.kill()
                    process.join()
            resume = max(saved(folder), default=0)
            kills.append(Kill(victim, progress[victim], seconds, hung, resume, errors(folder, attempt)))


def strike(processes: Sequence[ForkServerProcess], victim: int) -> tuple[float, int]:
    """Kills one process and waits for the others; returns how long that took, and how many hung."""
    pid = processes[victim].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    for process in processes:
        process.join(max(0.0, begin + HANGS - time.monotonic()))
    return time.monotonic() - begin, sum(process.is_alive() for process in processes)


def errors(folder: Path, attempt: int) -> str:
    """Returns what the first worker said that ended with an error."""
    return next((path.read_text() for path in sorted(folder.glob(f"error{attempt}.*"))), "no error")
