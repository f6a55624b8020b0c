"""Which rule for AdamW under DGC: candidates in plain PyTorch, and what the length of the warm-up buys.

    python -m benchmarks.accuracy.adam_candidates
    python -m benchmarks.accuracy.adam_candidates --methods "gradient, 1 %" --lr 3e-3

Shorter runs than adamw.py's and one seed: enough to leave out what is clearly worse, no more. Finished runs are kept in
results/adam_candidates.jsonl. With --methods or --lr it prints its table, and leaves the report as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.harness import RESULTS, Table, report

from .adam_variants import AdamVariant, Candidate, DenseAdamW
from .compare import paired, scores
from .replicas import WORKERS, train
from .runs import Record, Run, gather, options
from .tasks import TASKS, Task
from .traffic import share_of_dense, shown

TRAINED = ["gpt-adamw", "gpt2-adamw", "vit-adamw"]
STEPS, DENSE, CHOSEN = 1500, "dense", "gradient, 1 %"
GRADIENT: dict[str, Any] = {"rule": "local gradient"}
RULES: dict[str, dict[str, Any]] = {
    "gradient": GRADIENT,
    "gradient, without correction": {**GRADIENT, "correction": "none"},
    "gradient, step-ahead 0.5": {**GRADIENT, "ahead": 0.5},
    "corrected": {},
    "without correction": {"correction": "none"},
    "correction by cross products": {"correction": "cross"},
    "learning rate on arrival": {"lr_at": "arrival"},
    "momentum masked": {"masking": True},
    "residual decay 0.99": {"decay": 0.99},
    "step-ahead 0.25": {"ahead": 0.25},
    "step-ahead 0.5": {"ahead": 0.5},
    "step-ahead 1": {"ahead": 1.0},
    "cross products, step-ahead 0.5": {"correction": "cross", "ahead": 0.5},
    "all tensors compressed": {"dense_below": 0},
    "naive": {"rule": "naive"},
    "SCAPE, shared mask": {"rule": "SCAPE", "shared_mask": True},
    "SCAPE, own masks": {"rule": "SCAPE"},
    "AdamS at the receiver": {"rule": "AdamS"},
    "AdamS at the receiver, masked": {"rule": "AdamS", "masking": True},
}
"""What differs from Candidate's defaults: the local direction with its noise correction. "gradient" is dgc.AdamW."""
DENSITIES: dict[str, dict[str, Any]] = {"1 %": {}, "0.1 %": {"density": 0.001, "warmup": 0.5}}
AT_LOW_DENSITY = ("gradient", "corrected", "momentum masked", "step-ahead 0.5")
"""The rules that are tried at 0.1 % too."""
CONSTANT = {density: f"gradient, {100 * density:g} % throughout" for density in (0.0625, 0.3)}
"""What the density itself costs, without a warm-up."""
WARMUPS = {share: f"{CHOSEN}, warm-up {100 * share:g} %" for share in (0.0, 0.1, 0.5, 0.8)}
"""Share of the run over which density falls, beside the default."""
CURVE = dict(sorted({**WARMUPS, Candidate().warmup: CHOSEN}.items()))
METHODS: dict[str, Candidate | None] = {
    DENSE: None,
    **{
        f"{rule}, {density}": Candidate(**switches, **setting)
        for density, setting in DENSITIES.items()
        for rule, switches in RULES.items()
        if density == "1 %" or rule in AT_LOW_DENSITY
    },
    **{method: Candidate(**GRADIENT, density=density, warmup=0.0) for density, method in CONSTANT.items()},
    **{method: Candidate(**GRADIENT, warmup=share) for share, method in WARMUPS.items()},
}
ABOUT = (
    f"Test perplexity (lower is better), or accuracy (%, higher is better), at the end: {WORKERS} "
    "workers simulated in one process, candidates in plain PyTorch. Density falls from 6.25 %, over 30 % of the run to "
    "1 % and over half to 0.1 %, unless said. Bytes: of the whole run, in parts of what DDP sends with float32 "
    "gradients. SCAPE's shared mask is that of the workers' mean, and counted as if they knew it, which is generous "
    "twice."
)


def trained(name: str, lr: float | None) -> Task:
    """Returns a task, with another learning rate where one is given."""
    return TASKS[name] if lr is None else replace(TASKS[name], lr=lr)


def plan(tasks: Sequence[str], methods: Sequence[str], seeds: int, steps: int, lr: float | None) -> list[Run]:
    """Returns all runs, seed after seed."""
    return [
        Run(name, method, seed, steps, f"{trained(name, lr).recipe}, {METHODS[method]}")
        for seed in range(seeds)
        for name in tasks
        for method in methods
    ]


def perform(run: Run, lr: float | None = None) -> list[tuple[int, float]]:
    """Trains."""
    candidate = METHODS[run.method]
    chosen = DenseAdamW if candidate is None else partial(AdamVariant, candidate=candidate, steps=run.steps)
    return train(trained(run.task, lr), chosen, run.seed, run.steps)


def bytes_of(method: str, name: str, steps: int) -> float:
    """Returns what a method sends, in parts of dense training."""
    candidate = METHODS[method]
    if candidate is None:
        return 1.0
    return share_of_dense(TASKS[name].network(), candidate.config(steps), steps, WORKERS)


def differences(records: Sequence[Record], name: str, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """Returns each method's mean difference to dense."""
    base = scores(records, name, DENSE, seeds)
    return {m: statistics.fmean(paired(name, scores(records, name, m, seeds), base)) for m in methods}


def tables_of(records: Sequence[Record], methods: Sequence[str], seeds: Sequence[int], lr: float | None) -> list[Table]:
    """Returns a table for each task."""
    tables: list[Table] = []
    for name in dict.fromkeys(r.run.task for r in records):
        task, steps = trained(name, lr), records[0].run.steps
        unit = " %" if task.metric == "perplexity" else ""
        found = differences(records, name, methods, seeds)
        rows = [
            [
                method,
                f"{statistics.fmean(scores(records, name, method, seeds)):.2f}",
                "" if method == DENSE else f"{found[method]:+.2f}{unit}",
                shown(bytes_of(method, name, steps)),
            ]
            for method in methods
        ]
        title = f"**{name}**: {task.about}. {task.recipe}, {steps:,} steps, {len(seeds)} seed(s)."
        tables.append((title, ["candidate", task.metric, "difference to dense", "bytes of dense"], rows))
    return tables


def draw_warmups(records: Sequence[Record], seeds: Sequence[int], picture: Path) -> None:
    """Draws what the length of the warm-up costs in bytes, and what it gains."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    shares = [100 * share for share in CURVE]
    for name in dict.fromkeys(r.run.task for r in records):
        found = differences(records, name, [*CURVE.values()], seeds)
        sent = [100 * bytes_of(method, name, records[0].run.steps) for method in CURVE.values()]
        unit = "%" if TASKS[name].metric == "perplexity" else "points"
        panels[0].plot(
            shares, [*found.values()], marker="o", markersize=4, label=f"{name}: {TASKS[name].metric}, {unit}"
        )
        panels[1].plot(shares, sent, marker="o", markersize=4, label=name)
    for axes, title in zip(panels, ("difference to dense AdamW", "bytes of the run, % of dense"), strict=True):
        axes.set(title=title, xlabel="warm-up of density, % of the run")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    panels[0].axhline(0, color="black", linewidth=0.8)  # so that the axis holds 0: the differences are small
    panels[1].set_ylim(0)
    figure.suptitle("dgc.AdamW at 1 %", fontsize="medium")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    parser = options(__doc__, TRAINED, RESULTS / "adam_candidates.jsonl")
    parser.set_defaults(tasks=["gpt-adamw"], seeds=1, steps=STEPS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="some only, beside dense")
    parser.add_argument("--lr", type=float, help="another learning rate, of dense too")
    args = parser.parse_args()
    methods = [m for m in METHODS if not args.methods or m in (DENSE, *args.methods)]
    runs = plan(args.tasks, methods, args.seeds, args.steps, args.lr)
    found = gather(runs, partial(perform, lr=args.lr), args.file, args.processes, args.minutes)
    if len(found) < len(runs):
        return
    records, seeds, folder = [*found.values()], range(args.seeds), args.file.parent
    (title, headers, rows), *more = tables_of(records, methods, seeds, args.lr)
    whole = not args.methods and args.lr is None
    if whole:
        draw_warmups(records, seeds, folder / "adam_candidates.png")
    raw = {
        "scores": {name: {m: scores(records, name, m, seeds) for m in methods} for name in args.tasks},
        "commits of the runs": sorted({r.commit for r in records}),
    }
    report("adam_candidates" if whole else None, f"{ABOUT}\n\n{title}", headers, rows, raw, more, folder)


if __name__ == "__main__":
    main()
