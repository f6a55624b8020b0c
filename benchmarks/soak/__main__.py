"""A long run in which everything goes wrong: kills, overflows, discarded steps. Nothing may be lost.

    python -m benchmarks.soak

Gloo processes train with DDP and a GradScaler. A supervisor kills one of them now and then, in the middle of whatever
it is doing, and starts all of them again from the last checkpoint, as torchrun's elastic agent would. Some steps have
an Inf or a NaN on one rank, some are discarded; there are stretches of gradient accumulation and of state.dense. The
gradients and all that happens to them follow from --seed, the step and the rank, so the same steps come again after a
restart, and at the end the sum of what has to be in the parameters or in the residual is computed anew.

What is checked, besides replicas and restarts to the bit:

- Integer gradients: initial parameters - lr * average = parameters - lr * averaged residual, in every bit. The
  integers are multiples of the number of ranks, so that averages are integers and every sum is exact. Momentum is 0.
- Normally distributed gradients, momentum 0: the same, to 1e-5 of the sum.
- A parameter with momentum 0.9, whose sums depend on what was sent: a simulation in float64 from each checkpoint to
  the next, to 1 % of the way gone. Where two entries are nearly equal, rounding decides which is sent and loses its
  momentum, so over thousands of steps the two drift apart.
- With --adamw, dgc.AdamW trains: signs of integers times lr are conserved in every bit; no simulation.
- With --nodes 2, two nodes of ranks are the workers, DGCState's mesh=, and the ranks of each divide its residual. An
  entry that is not finite on one rank is then lost on all ranks of its node, whose mean it spoils. state.dense, which
  is refused there, stays off.
- Memory of the processes of the last start, which no kill ends. All kills come in the first 60 % of the run.

Exits with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import torch
from matplotlib import pyplot
from tabulate import tabulate

from benchmarks.harness import RESULTS, report

from .checks import check, records_of
from .ledger import ledger_of
from .run import Run
from .supervisor import Kill, supervise


def name_of(run: Run) -> str:
    """Returns the name of a run's files among the results."""
    return "_".join(["soak", *(["nodes"] if run.nodes else []), *(["adamw"] if run.adamw else [])])


def draw(folder: Path, run: Run, kills: Sequence[Kill], picture: Path) -> None:
    """Draws residual norm and memory against steps."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for rank in range(run.ranks):
        records = records_of(folder, rank)
        for attempt in range(len(kills) + 1):
            part = [r for r in records if r.attempt == attempt]
            steps = [r.finished for r in part]
            label = f"rank {rank}" if attempt == 0 else None
            above.plot(steps, [r.norm for r in part], color=f"C{rank}", linewidth=0.7, label=label)
            below.plot(steps, [r.resident / 1e6 for r in part], color=f"C{rank}", linewidth=1)
    for axes in (above, below):
        for i, kill in enumerate(kills):
            axes.axvline(
                kill.progress, color="black", linewidth=0.7, linestyle=":", label="" if i else "a worker is killed"
            )
    above.set_ylabel("norm of the residual")
    above.legend(fontsize="small")
    below.set_ylabel("resident memory, MB (not from 0)")
    below.set_xlabel("step")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Runs, checks and reports."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, help="default: 3, or two for each node")
    parser.add_argument("--nodes", type=int, default=0, help="nodes that the ranks form; 0: each is its own worker")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps from one checkpoint to the next")
    parser.add_argument(
        "--smoke", action="store_true", help="300 steps, 2 kills, a checkpoint every 40; writes no file"
    )
    parser.add_argument("--adamw", action="store_true", help="train with dgc.AdamW")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.kills, args.save_every = 300, 2, 40
    args.ranks = args.ranks or 2 * args.nodes or 3
    if not 40 <= args.steps <= 200_000:
        parser.error(f"--steps: expected 40 to 200,000 (beyond, float32 sums are not exact), got {args.steps}")
    if not 1 <= args.ranks <= 8:
        parser.error(f"--ranks: expected 1 to 8, got {args.ranks}")
    if args.nodes < 0 or (args.nodes and args.ranks % args.nodes):
        parser.error(f"--nodes: expected a divisor of {args.ranks} ranks, got {args.nodes}")
    if not 0 <= args.kills <= args.steps // 20:
        parser.error(f"--kills: expected 0 to {args.steps // 20} for {args.steps} steps, got {args.kills}")
    if args.save_every < 1:
        parser.error(f"--save-every: expected 1 or more, got {args.save_every}")
    run = Run(args.steps, args.ranks, args.kills, args.seed, args.save_every, args.adamw, args.nodes)

    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kills = supervise(run, folder)
        seconds = time.monotonic() - begin
        ledger = ledger_of(run, folder)
        checks = check(run, folder, kills, ledger)
        if not args.smoke:
            draw(folder, run, kills, RESULTS / f"{name_of(run)}.png")
        memory = [
            [[r.finished, r.resident, r.heap] for r in records_of(folder, rank) if r.attempt == len(kills)][::100]
            for rank in range(run.ranks)
        ]
    passed = all(good for *_, good in checks)
    rows = [[*texts, "pass" if good else "FAIL"] for *texts, good in checks]
    headers = ["check", "expected", "found", "verdict"]
    grouped = f" in {run.nodes} nodes" if run.nodes else ""
    title = (
        f"Soak: {run.steps:,} steps on {run.ranks} gloo processes{grouped}, {len(kills)} of them killed, "
        f"seed {run.seed}, {seconds / 60:.0f} minutes: {'pass' if passed else 'FAIL'}."
    )
    happened = [
        *[[f"steps {what}", f"{count:,}"] for what, count in ledger.counts.items()],
        ["loss scale, lowest to highest", f"2^{math.log2(ledger.lowest):g} to 2^{math.log2(ledger.highest):g}"],
        ["checkpoints", f"every {run.save_every} steps, the last two kept"],
    ]
    killed = [
        [
            f"rank {kill.rank}, {'saving after' if kill.progress % 1 else 'after'} {int(kill.progress):,} steps",
            f"{kill.resumed:,}",
            f"{kill.seconds:.1f}",
        ]
        for kill in kills
    ]
    more = [
        ("What happened", ["", ""], happened),
        ("Kills", ["killed", "resumed after step", "seconds until the others had ended"], killed),
    ]
    if args.smoke:
        print(f"\n{title}\n\n{tabulate(rows, headers=headers, tablefmt='github')}")
    else:
        raw = {
            **asdict(run),
            "seconds": seconds,
            "kills": [asdict(kill) for kill in kills],
            "checks": rows,
            "step, resident bytes, those of no file; by rank, after the last restart": memory,
        }
        report(name_of(run), title, headers, rows, raw, more)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
