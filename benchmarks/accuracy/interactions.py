"""Whether what DGC costs in accuracy depends on what else a training script does: the MNIST CNN, dense and DGC 1 %.

    python -m benchmarks.accuracy.interactions

The factors are channels_last, bf16 autocast, label smoothing, progressive resizing, an average of the weights (EMA),
recomputation of activations, and torch.compile. Each is there or not, so the design has two levels: none of them, each
alone, and all together; --full takes every combination instead. In each cell dense and DGC have the same seed, samples
and recipe, and their difference is what DGC costs there. A factor interacts where this cost is another one with the
factor than without it: the difference of differences, seed by seed, with its 95 % interval.

Workers and samples are convergence.py's. Finished runs are kept in results/interactions.jsonl, so that the table can be
gathered over several calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import dgc
from benchmarks.harness import RESULTS, Table

from .compare import HEADERS, Difference, difference, draw, paired, publish, scores
from .replicas import DGC, WORKERS, Batch, Dense, Replicated, train
from .runs import Record, Run, gather, options, told
from .tasks import TASKS, Task, loss_of

TASK, STEPS = "mnist", 1500
DENSITY, DENSE_BELOW = 0.01, 4096
"""The larger convolution has 4,608 weights: it is compressed too, since channels_last lays it out in another way."""
SMOOTHING = 0.1
DECAY = 0.99
"""Of the EMA, at each step."""
SIDES = (8, 11, 14)
"""Of the images, in pixels, in equal parts of the run."""
FACTORS = {
    "channels_last": "weights and images in that memory format",
    "bf16 autocast": "forward pass in bfloat16 where autocast says so",
    "label smoothing": f"labels give {SMOOTHING:g} to all classes",
    "progressive resizing": f"images of {', '.join(map(str, SIDES))} pixels a side, a third of the run each",
    "EMA": f"measured are weights averaged with decay {DECAY:g}",
    "recomputation": "torch.utils.checkpoint; BatchNorm sees each batch twice",
    "torch.compile": "of forward and backward pass, by Inductor",
}
"""What each of them is."""
NONE, SEPARATOR = "none", " + "

Cell = frozenset[str]
"""The factors that are there."""


def cells(factors: Sequence[str], full: bool) -> list[Cell]:
    """Returns none, each alone and all together; or every combination, the smaller ones first."""
    sizes = range(len(factors) + 1) if full else sorted({0, 1, len(factors)})
    return [frozenset(chosen) for size in sizes for chosen in combinations(factors, size)]


def name_of(cell: Cell) -> str:
    """Returns how a cell is called, with its factors in the order of FACTORS."""
    return SEPARATOR.join(name for name in FACTORS if name in cell) or NONE


class Factored(Replicated):
    """A Replicated with factors; in front of Dense or DGC among the bases of a class."""

    cell: Cell
    steps: int

    def use(self, cell: Cell, steps: int) -> None:
        """Prepares a run of so many steps with these factors, of networks that are `prepared`."""
        self.cell, self.steps, self.step = cell, steps, 0
        networks = [replica.network for replica in self.replicas]
        self.called: dict[nn.Module, Callable[[Tensor], Tensor]] = {network: network for network in networks}
        if "torch.compile" in cell:
            torch.compiler.reset()  # what other runs have compiled counts towards the limit of versions
            # With a whole graph, what cannot be compiled is an error, and not left as it is.
            self.called = {network: torch.compile(network, dynamic=False, fullgraph=True) for network in networks}
        average = get_ema_multi_avg_fn(DECAY)
        self.average = AveragedModel(networks[0], multi_avg_fn=average, use_buffers=True) if "EMA" in cell else None

    @property
    def network(self) -> nn.Module:
        """The one that is measured: the first worker's, or the average of what that has been."""
        return super().network if self.average is None else self.average

    def learn(self, batches: Sequence[Batch]) -> None:
        """Takes one step."""
        super().learn(batches)
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(super().network)

    def loss(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of a worker's network on its batch."""
        cell = self.cell
        if "progressive resizing" in cell:
            side = SIDES[self.step * len(SIDES) // self.steps]
            inputs = interpolate(inputs, (side, side), mode="bilinear", antialias=True)
        if "channels_last" in cell:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        called = self.called[network]
        with torch.autocast("cpu", torch.bfloat16) if "bf16 autocast" in cell else nullcontext():
            scores = checkpoint(called, inputs, use_reentrant=False) if "recomputation" in cell else called(inputs)
        return loss_of(scores.float(), targets, SMOOTHING if "label smoothing" in cell else 0.0)


def prepared(network: nn.Module, cell: Cell) -> nn.Module:
    """Makes a network one of these factors, in place, and returns it."""
    if "progressive resizing" in cell:
        flatten = next(module for module in network.modules() if isinstance(module, nn.Flatten))
        flatten.register_forward_pre_hook(_same_side)
    if "channels_last" in cell:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return network


def _same_side(_: nn.Module, given: tuple[Tensor]) -> Tensor:
    """Makes features of images of any size those of the largest, so that the linear layers fit."""
    side = SIDES[-1] // 4
    return adaptive_avg_pool2d(given[0], side)


class FactoredDense(Factored, Dense):
    """Dense training with factors."""

    def __init__(self, network: nn.Module, task: Task, cell: Cell, steps: int) -> None:
        """Makes the replicas."""
        super().__init__(prepared(network, cell), task)
        self.use(cell, steps)


class FactoredDGC(Factored, DGC):
    """DGC with factors."""

    def __init__(self, network: nn.Module, task: Task, cell: Cell, steps: int) -> None:
        """Makes the replicas and their states."""
        super().__init__(prepared(network, cell), task, config(steps))
        self.use(cell, steps)


METHODS = {"dense": FactoredDense, "DGC 1 %": FactoredDGC}


def config(steps: int) -> dgc.DGCConfig:
    """Returns that of DGC."""
    return dgc.DGCConfig(DENSITY, warmup_steps=steps // 10, dense_below=DENSE_BELOW)


def plan(factors: Sequence[str], seeds: int, steps: int, full: bool) -> list[Run]:
    """Returns all runs, seed after seed."""
    runs = []
    for seed in range(seeds):
        for cell in cells(factors, full):
            about = "; ".join(f"{name}: {FACTORS[name]}" for name in FACTORS if name in cell)
            for method in METHODS:
                used = told(config(steps) if method != "dense" else None)
                runs.append(
                    Run(TASK, f"{method}, {name_of(cell)}", seed, steps, f"{TASKS[TASK].recipe}, {used}, {about}")
                )
    return runs


def perform(run: Run) -> list[tuple[int, float]]:
    """Trains."""
    method, name = run.method.split(", ")
    cell = frozenset(name.split(SEPARATOR)) - {NONE}
    return train(TASKS[run.task], partial(METHODS[method], cell=cell, steps=run.steps), run.seed, run.steps)


def interactions(costs: Mapping[Cell, Sequence[float]], factors: Sequence[str]) -> dict[str, Difference]:
    """Returns by how much the cost of DGC differs where a factor is there.

    Args:
        costs: DGC - dense in points, by seed, of each cell.
        factors: those asked for.

    Returns:
        For each factor its mean over the cells that have it, less the mean over the same cells without it; for "all"
        the cell of all factors less that of none.
    """
    found = {}
    for factor in factors:
        having = [cell for cell in costs if factor in cell and cell - {factor} in costs]
        found[factor] = _contrast([costs[cell] for cell in having], [costs[cell - {factor}] for cell in having])
    if len(factors) > 1:
        found["all"] = _contrast([costs[frozenset(factors)]], [costs[frozenset()]])
    return found


def _contrast(with_it: Sequence[Sequence[float]], without: Sequence[Sequence[float]]) -> Difference:
    """Returns the mean over cells, seed by seed, of costs with a factor, less those without it."""
    means = [[sum(of_seed) / len(of_seed) for of_seed in zip(*side, strict=True)] for side in (with_it, without)]
    return difference(TASK, *means)


def verdict(found: Difference) -> str:
    """Returns what an interval says: whether it leaves out 0."""
    return "no sign of it" if found.low <= 0 <= found.high else "interacts"


def tell(
    factors: Sequence[str], seeds: Sequence[int], steps: int, full: bool, records: Sequence[Record], folder: Path
) -> None:
    """Writes tables, picture and raw figures."""
    costs: dict[Cell, list[float]] = {}
    found: dict[str, Difference] = {}
    rows = []
    for cell in cells(factors, full):
        dense, ours = (scores(records, TASK, f"{method}, {name_of(cell)}", seeds) for method in METHODS)
        costs[cell] = paired(TASK, ours, dense)
        it = found[name_of(cell)] = difference(TASK, ours, dense)
        means = [f"{sum(of) / len(of):.2f}" for of in (dense, ours)]
        rows.append([name_of(cell), *means, f"{it.mean:+.2f}", f"{it.low:+.2f} to {it.high:+.2f}"])
    effects = interactions(costs, factors)
    task = TASKS[TASK]
    title = f"**{TASK}**: {task.about}; {task.metric}. {task.recipe}, {steps:,} steps."
    tables: list[Table] = [
        (
            "What each factor changes in DGC - dense, in points, from the cells without it to those with it.",
            ["factor", "what it is", "difference of differences", "95 % interval", "interaction"],
            [
                [
                    name,
                    FACTORS.get(name, "all of them together"),
                    f"{it.mean:+.2f}",
                    f"{it.low:+.2f} to {it.high:+.2f}",
                    verdict(it),
                ]
                for name, it in effects.items()
            ],
        ),
        (title, ["factors", *METHODS, HEADERS[3].format("dense"), HEADERS[4]], rows),
    ]
    draw({TASK: effects}, "DGC - dense without the factor", False, folder / "interactions.png")
    about = (
        f"Test accuracy in % at the end: {WORKERS} workers simulated in one process, seeds {seeds[0]} to {seeds[-1]}, "
        f"warm-up over the first tenth. Where nothing interacts, one of {len(effects)} intervals at least leaves out "
        f"0 by chance in up to {100 * (1 - 0.95 ** len(effects)):.0f} % of such tables."
    )
    publish("interactions", about, tables, {TASK: found, f"{TASK}, interactions": effects}, records, folder)


def main() -> None:
    """Gathers the runs, and reports once they are complete."""
    parser = options(__doc__, [TASK], RESULTS / "interactions.jsonl")
    parser.add_argument(
        "--factors", nargs="+", choices=FACTORS, default=[*FACTORS], metavar="FACTOR", help=", ".join(FACTORS)
    )
    parser.add_argument("--full", action="store_true", help="every combination of the factors")
    args = parser.parse_args()
    steps = args.steps or STEPS
    runs = plan(args.factors, args.seeds, steps, args.full)
    found = gather(runs, perform, args.file, args.processes, args.minutes)
    if len(found) == len(runs):
        tell(args.factors, range(args.seeds), steps, args.full, [*found.values()], args.file.parent)


if __name__ == "__main__":
    main()
