"""Does it hold at the next size: GPTs of 1.5, 4.5 and 12 million parameters, dense and under DGC, several seeds.

    python -m benchmarks.accuracy.sizes

All sizes see equally many tokens a parameter, in batches of one size, so that the number of steps grows with the
number of parameters, and the time of a run with its square. The learning rate is the best of 1, 2, 4 and 8 thousandths
for dense training of the smallest size, on another seed, and falls with the width; at the next size that was better
than not to lower it, by 1.9 %. DGC has the settings that adamw.py found: 1 % without a warm-up, 0.1 % with one over
half of the run. Workers, samples and seeds are convergence.py's, the rule is dgc.AdamW.

Small sizes come first. Finished runs are kept in results/sizes.jsonl, so that the table can be gathered over several
calls: --minutes says when to stop starting new ones, and --tasks which sizes are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib import pyplot

import dgc
from benchmarks.harness import RESULTS

from .adam_variants import DENSE_BELOW, WARMUP, DenseAdamW
from .compare import Difference, difference, publish, scores
from .data import LENGTH
from .replicas import DGC, WORKERS, train
from .runs import Point, Record, Run, gather, options, told
from .tasks import TASKS, Task
from .traffic import share_of_dense, shown

TRAINED = ["gpt-1.5M", "gpt-4.5M", "gpt-12M"]
DENSE = "dense"
METHODS = {"DGC 1 %": (0.01, 0.0), "DGC 0.1 %": (0.001, 0.5)}
"""Density, and the share of the run over which it falls."""


def config(method: str, task: Task, steps: int) -> dgc.DGCConfig | None:
    """Returns a method's configuration; None for dense."""
    if method == DENSE:
        return None
    density, warmup = METHODS[method]
    return dgc.DGCConfig(density, round(warmup * steps), WARMUP, clip_norm=task.clip_norm, dense_below=DENSE_BELOW)


def parameters_of(task: Task) -> int:
    """Returns the number of a network's parameters."""
    return sum(p.numel() for p in task.network().parameters())


def tokens_of(task: Task, steps: int) -> int:
    """Returns how many tokens all workers see in a run."""
    return steps * WORKERS * task.batch_size * LENGTH


def plan(tasks: Sequence[str], seeds: int, steps: int | None) -> list[Run]:
    """Returns all runs, size after size as `tasks` are ordered, and seed after seed."""
    runs = []
    for name in tasks:
        task = TASKS[name]
        length = steps or task.steps
        runs += [
            Run(name, method, seed, length, f"{task.recipe}, {told(config(method, task, length))}")
            for seed in range(seeds)
            for method in (DENSE, *METHODS)
        ]
    return runs


def perform(run: Run) -> list[Point]:
    """Trains, and measures at the end only, which takes long enough."""
    task = TASKS[run.task]
    chosen = config(run.method, task, run.steps)
    make = DenseAdamW if chosen is None else partial(DGC, config=chosen)
    return [*train(task, make, run.seed, run.steps, points=1)]


def draw(found: Mapping[str, Mapping[str, Difference]], picture: Path) -> None:
    """Draws each method's difference to dense training against the number of parameters."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    sizes = [parameters_of(TASKS[name]) for name in found]
    for place, method in enumerate(METHODS):
        its = [of[method] for of in found.values()]
        errors = [[it.mean - it.low for it in its], [it.high - it.mean for it in its]]
        apart = [size * (1 + 0.03 * place) for size in sizes]
        axes.errorbar(apart, [it.mean for it in its], yerr=errors, marker="o", capsize=3, label=method)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size / 1e6:.1f}M" for size in sizes])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("parameters")
    axes.set_ylabel("perplexity above dense training's, per cent")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def row_of(name: str, steps: int, scores_of: Mapping[str, Sequence[float]]) -> list[Any]:
    """Returns a size's row under headers().

    Args:
        name: of the task.
        steps: of a run.
        scores_of: perplexities by method, in the same order of seeds.
    """
    task = TASKS[name]
    size, tokens = parameters_of(task), tokens_of(task, steps)
    text = LENGTH * len(task.load().inputs)
    row = [name, f"{size:,}", f"{task.lr:g}", f"{steps:,}", f"{tokens / size:.4f}", f"{tokens / text:.2f}"]
    row += [f"{statistics.fmean(scores_of[DENSE]):.2f}"]
    for method in METHODS:
        it = difference(name, scores_of[method], scores_of[DENSE])
        chosen = config(method, task, steps)
        assert chosen is not None
        row += [f"{it.mean:+.2f} % ({it.low:+.2f} to {it.high:+.2f})"]
        row += [shown(share_of_dense(task.network(), chosen, steps, WORKERS))]
    return row


def headers() -> list[str]:
    """Returns the headers of the table."""
    of_methods = [[f"{method}: difference (95 %)", "bytes of dense"] for method in METHODS]
    first = ["task", "parameters", "lr", "steps", "tokens a parameter", "passes over the text", "dense: perplexity"]
    return [*first, *chain(*of_methods)]


def tell(tasks: Sequence[str], seeds: Sequence[int], records: Sequence[Record], folder: Path) -> None:
    """Writes table, picture and raw figures."""
    length = {r.run.task: r.run.steps for r in records}
    found: dict[str, dict[str, Difference]] = {}
    rows = []
    for name in tasks:
        of = {method: scores(records, name, method, seeds) for method in (DENSE, *METHODS)}
        rows.append(row_of(name, length[name], of))
        found[name] = {method: difference(name, of[method], of[DENSE]) for method in METHODS}
    about = (
        "Test perplexity (lower is better) at the end, and its difference to dense training of the same size and seed: "
        f"{WORKERS} workers simulated in one process, seeds {seeds[0]} to {seeds[-1]}. At 0.1 % density falls from "
        "6.25 % over half of the run, at 1 % there is no warm-up. Bytes: of the whole run, in parts of what DDP sends "
        "with float32 gradients."
    )
    rest = TASKS[tasks[0]].recipe.split("betas ", 1)[1]
    networks = "; ".join(f"**{name}**: {TASKS[name].about}" for name in tasks)
    title = f"{networks}. King James Bible, AdamW, cosine, rising over the first 10 %, betas {rest}."
    draw(found, folder / "sizes.png")
    publish("sizes", about, [(title, headers(), rows)], found, records, folder)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    args = options(__doc__, TRAINED, RESULTS / "sizes.jsonl", seeds=3).parse_args()
    runs = plan(args.tasks, args.seeds, args.steps)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(args.tasks, range(args.seeds), [*found.values()], args.file.parent)


if __name__ == "__main__":
    main()
