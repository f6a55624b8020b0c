"""The examples of models that change, dense and with DGC: accuracy and bytes, over seeds.

    python -m benchmarks.accuracy.examples

Each of the six runs on two CPU processes, with --dense and without, for every seed. With --quick and DGC a run took at
most 94 seconds on two cores, which were shared: gan 94, block_sparse 74, lottery_ticket 38, rigl 21 (SET 26),
reversible_lm and progressive less than a minute. Dense ones took as long or less; that of gan has not been timed.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.accuracy.frameworks import TORCHRUN
from benchmarks.harness import ROOT, report

EXAMPLES = ("gan", "progressive", "reversible_lm", "block_sparse", "rigl", "lottery_ticket")
RESULT = re.compile(r"(?:accuracy|score) ([0-9.]+) %, ([0-9,]+) bytes sent")


def measured(name: str, *options: str) -> tuple[float, int]:
    """Returns accuracy in per cent, and the bytes that a rank has sent, of one run.

    Raises:
        RuntimeError: it failed, or printed no result.
    """
    command = [sys.executable, *TORCHRUN, f"examples/{name}.py", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = RESULT.search(result.stdout)
    if result.returncode or not found:
        raise RuntimeError(f"{' '.join(command)}: expected a result, got {result.stdout[-500:]}{result.stderr[-2000:]}")
    return float(found[1]), int(found[2].replace(",", ""))


def row(name: str, dense: list[tuple[float, int]], ours: list[tuple[float, int]]) -> list[str]:
    """Returns a row of the table: mean accuracies, their differences seed by seed, and bytes of a run in MB."""
    differences = [b - a for (a, _), (b, _) in zip(dense, ours, strict=True)]
    means = [f"{statistics.mean(accuracy for accuracy, _ in runs):.2f} %" for runs in (dense, ours)]
    spread = f"{statistics.mean(differences):+.2f} ({min(differences):+.2f} to {max(differences):+.2f})"
    megabytes = [f"{statistics.mean(sent for _, sent in runs) / 1e6:,.1f}" for runs in (dense, ours)]
    return [name, *means, spread, *megabytes]


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="examples")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="length of each run, in place of the example's own")
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--out", default="examples", help="name under results/ (default: %(default)s)")
    args = parser.parse_args()
    length = [*(["--quick"] if args.quick else []), *(["--steps", str(args.steps)] if args.steps else [])]
    raw: dict[str, Any] = {}
    rows = []
    for name in args.only:
        runs: dict[str, list[tuple[float, int]]] = {"dense": [], "dgc": []}
        for seed in range(args.seeds):
            for kind, option in (("dense", ["--dense"]), ("dgc", [])):
                runs[kind].append(measured(name, "--seed", str(seed), *length, *option))
                print(f"{name}, {kind}, seed {seed}: {runs[kind][-1]}", file=sys.stderr)
        raw[name] = runs
        rows.append(row(name, runs["dense"], runs["dgc"]))
    report(
        args.out,
        f"The examples of models that change, on two processes, {args.seeds} seeds{', --quick' if args.quick else ''}: "
        "mean accuracy on data not trained on, and the difference of the same seeds in points (lowest to highest). MB: "
        "what a rank sends in the whole run, warm-up included; dense as a ring all-reduce.",
        ["example", "dense", "DGC, 1 %", "difference", "MB, dense", "MB, DGC"],
        rows,
        raw,
    )


if __name__ == "__main__":
    main()
