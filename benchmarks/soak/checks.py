"""The checks of a soak run's results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ledger import Ledger
from .run import (
    COMPRESSED,
    RANDOM,
    SHAPES,
    Given,
    Run,
)
from .supervisor import Kill
from .worker import Record


def lost(run: Run, results: Sequence[Mapping[str, Any]], ledger: Ledger, name: str) -> Tensor:
    """Returns the gradient that is in neither the parameter nor the residual, summed over the ranks; float64."""
    lr = next(sgd["lr"] for names, sgd in run.groups.items() if name in names)
    start, end = Given().get_parameter(name).detach().double(), results[0]["parameters"][name].double()
    lost: Tensor = ledger.total[name] - run.ranks * (start - end) / lr
    if name in COMPRESSED:
        for first in range(0, run.ranks, run.places):
            parts = [result["residual"][name].flatten() for result in results[first : first + run.places]]
            waiting = run.places * torch.cat(parts).view(SHAPES[name]).double()  # of the mean of the node's ranks
            lost -= waiting / (lr if run.adamw else 1.0)  # which AdamW's has in it
    return lost


def records_of(folder: Path, rank: int) -> list[Record]:
    """Reads the records in a rank's log."""
    records = []
    for line in (folder / f"rank{rank}.log").read_text().splitlines():
        attempt, finished, digest, size, heap = map(int, line.split()[:-1])
        records.append(Record(attempt, finished, digest, size, heap, float(line.split()[-1])))
    return records


Check = tuple[str, str, str, bool]
"""The name of a check, the expected result, the result found, and whether the check passed."""


def check(run: Run, folder: Path, kills: Sequence[Kill], ledger: Ledger) -> list[Check]:
    """Returns the results of all checks of a run."""
    results = [torch.load(folder / f"final{rank}.pt", weights_only=True) for rank in range(run.ranks)]
    records = [records_of(folder, rank) for rank in range(run.ranks)]
    return [
        check_replicas(results),
        *check_conservation(run, results, ledger),
        *([] if run.adamw else [check_momentum(ledger)]),
        check_counts(results, ledger),
        *check_restarts(run, records, kills),
        *check_memory(records),
    ]


def check_replicas(results: Sequence[Mapping[str, Any]]) -> Check:
    """Compares the ranks' parameters, bit by bit."""
    differ = sorted(
        {n for r in results for n, p in r["parameters"].items() if not torch.equal(p, results[0]["parameters"][n])}
    )
    return "parameters on all ranks", "the same bits", ", ".join(differ) or "the same bits", not differ


def check_conservation(run: Run, results: Sequence[Mapping[str, Any]], ledger: Ledger) -> list[Check]:
    """Looks for gradients that were lost or applied twice."""
    checks: list[Check] = []
    integers = {name: lost(run, results, ledger, name) for name in SHAPES if name not in RANDOM}
    for kind, names in (
        ("compressed", [n for n in integers if n in COMPRESSED]),
        ("dense", [n for n in integers if n not in COMPRESSED]),
    ):
        wrong = sum(int(integers[name].count_nonzero()) for name in names)
        numel = sum(integers[name].numel() for name in names)
        expected, found = "all entries exact", f"{numel - wrong:,} of {numel:,} exact"
        checks.append((f"conservation of integers, {kind}, {run.ranks} ranks", expected, found, wrong == 0))
    if run.adamw:
        return checks  # directions of the others depend on rounding
    error = float(lost(run, results, ledger, "normals").norm() / ledger.total["normals"].norm())
    about = f"conservation of normal gradients, {run.ranks} ranks"
    return [*checks, (about, "< 1e-5 of the sum", f"{error:.1e}", error < 1e-5)]


def check_momentum(ledger: Ledger) -> Check:
    """Compares momentum with that of the simulation."""
    found = f"{100 * ledger.momentum:.2g} % at most"
    return "momentum 0.9 against a simulation in float64", "< 1 % between checkpoints", found, ledger.momentum < 0.01


def check_counts(results: Sequence[Mapping[str, Any]], ledger: Ledger) -> Check:
    """Compares steps applied and the loss scale with those that follow from the events."""
    expected = f"{ledger.applied:,} and 2^{math.log2(ledger.scale):g}"
    found = {f"{result['applied']:,} and 2^{math.log2(result['scale']):g}" for result in results}
    return "steps applied and last loss scale", expected, "; ".join(sorted(found)), found == {expected}


def check_restarts(run: Run, records: Sequence[Sequence[Record]], kills: Sequence[Kill]) -> list[Check]:
    """Checks that restarts resume from the last complete checkpoint, and that replayed steps give the same bits."""
    good = 0
    for attempt, kill in enumerate(kills):
        reached = max(r.finished for log in records for r in log if r.attempt == attempt)
        last = (reached - 1) // run.save_every * run.save_every  # a step after a save: this save was complete
        begins = {next(r.finished for r in log if r.attempt == attempt + 1) for log in records}
        good += begins == {kill.resumed} and kill.resumed >= last
    replayed = same = 0
    for log in records:
        before: dict[int, int] = {}
        for record in log:
            if record.finished in before:
                replayed += 1
                same += before[record.finished] == record.digest
            else:
                before[record.finished] = record.digest
    hung = sum(kill.hung for kill in kills)
    slowest = max((kill.seconds for kill in kills), default=0.0)
    all_of = f"all of {len(kills)}"
    # What is loaded counts as a replayed step: the bits are those of the step after which it was saved.
    return [
        ("restarts from the last complete checkpoint", all_of, str(good), good == len(kills) == run.kills),
        (
            "parameters, u, v, scale after replayed steps",
            "the same bits",
            f"{same:,} of {replayed:,}",
            same == replayed,
        ),
        ("survivors of a kill end by themselves", "all", f"{hung} hung, slowest {slowest:.1f} s", hung == 0),
    ]


def check_memory(records: Sequence[Sequence[Record]]) -> list[Check]:
    """Compares memory early and late in the life of the last processes; the worst rank's."""
    changes: dict[str, list[tuple[float, float, float]]] = {"resident memory": [], "resident memory without files": []}
    for log in records:
        last = [record for record in log if record.attempt == log[-1].attempt]
        warmup = min(500, len(last) // 4)
        window = min(1000, (len(last) - warmup) // 3)
        allowed = 0.01 if window >= 500 else 0.05  # a young process still grows
        for what, sizes in zip(changes, ([r.resident for r in last], [r.heap for r in last]), strict=True):
            early, late = sum(sizes[warmup:][:window]) / window, sum(sizes[-window:]) / window
            changes[what].append((late / early - 1, early, late))
    checks: list[Check] = []
    for what, found in changes.items():
        change, early, late = max(found)
        about = f"{what}, first to last {window:,} of {len(last):,} steps"
        figures = f"{100 * change:+.2f} % ({early / 1e6:.1f} to {late / 1e6:.1f} MB)"
        checks.append((about, f"at most {100 * allowed:g} % more", figures, change <= allowed))
    return checks
