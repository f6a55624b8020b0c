"""What the benchmarks share: fair timing, a description of the machine, and results as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import dgc

ROOT = Path(__file__).parent.parent
"""The repository, from which `python -m` finds the benchmarks."""
RESULTS = ROOT / "benchmarks" / "results"
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""What the launchers set where there is no GPU; see launch/environment.sh."""


def keep_freed_memory() -> None:
    """Gives the processes that are started from now on the launchers' settings of the C library's allocator."""
    for name, value in KEEP_FREED_MEMORY.items():
        os.environ.setdefault(name, value)


def interleave(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int,
    prepare: Callable[[], object],
    progress: Callable[[], object] = lambda: None,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Times every competitor once a round, in turn, so that a machine that slows down slows all of them.

    Each runs twice in a row, prepared each time, and the second run is timed: what the one before it did to caches and
    to pages of memory is not its doing. The first round is not counted.

    Args:
        competitors: by name.
        rounds: that are counted.
        prepare: is called in front of every run.
        progress: is called after every round.
        before: what comes right before a competitor in a real step, and is not timed; by the competitor's name.

    Returns:
        Seconds of each competitor, by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for round_index in range(rounds + 1):
        for name, run in competitors.items():
            first = (before or {}).get(name, lambda: None)
            prepare()
            first()
            run()
            prepare()
            first()
            begin = time.perf_counter()
            run()
            if round_index:
                seconds[name].append(time.perf_counter() - begin)
        progress()
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> tuple[float, float, float]:
    """Returns median, lowest and highest ratio of two competitors' times, round by round."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def shown(median: float, low: float, high: float) -> str:
    """Returns a ratio with its spread, as the tables show it."""
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def machine() -> dict[str, Any]:
    """Returns what a figure depends on: processor, versions, commit, command."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgc": dgc.__version__,
        "backend": dgc.backend("cpu"),
        **(gpu() if torch.cuda.is_available() else {}),
        "commit": printed("git", "describe", "--always", "--dirty"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),  # sys.argv has no -m, and a path of this machine
    }


def gpu() -> dict[str, Any]:
    """Returns what a figure of the current GPU depends on besides."""
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "cuda backend": dgc.backend("cuda"),
    }


def printed(*command: str) -> str:
    """Returns what a command prints; nothing where it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]
"""Title, headers, rows."""


def report(
    name: str | None,
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    raw: Mapping[str, Any],
    more: Sequence[Table] = (),
    folder: Path | None = None,
) -> None:
    """Prints a table, and `more` of them, and writes them with the raw figures to NAME.md and NAME.json in a folder.

    Without a name it writes nothing; without a folder, to results/.
    """
    about = machine()
    tables = [
        f"{title}\n\n{tabulate(rows, headers=headers, tablefmt='github', disable_numparse=True)}"
        for title, headers, rows in [(title, headers, rows), *more]
    ]
    described = ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
    text = "\n\n".join([*tables, f"{described}\n`{about['command']}`\n"])
    print("\n" + text)
    if name:
        write(name, text, {"machine": about, **raw}, folder)


def result_name(text: str) -> str:
    """Returns the name of a result, as an argument gives it.

    Raises:
        argparse.ArgumentTypeError: it is a path, which nobody should find out after the measurement.
    """
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"expected a name without folders, of files in {RESULTS}, got {text!r}")
    return text


def write(name: str, text: str, raw: Mapping[str, Any], folder: Path | None = None) -> None:
    """Writes a text and its raw figures to NAME.md and NAME.json in a folder, else in results/."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
