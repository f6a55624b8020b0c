"""The claims of the method, one by one: what its authors say, what the results here say, and a verdict by a rule.

page.py puts the table into docs/results.md. Every figure of ours is computed here from the files of this folder; no
result, no figure. What the authors say is quoted, with its source.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.accuracy import ablation, adamw, clipping, convergence
from benchmarks.accuracy.ablation import DENSE, PAPER
from benchmarks.accuracy.compare import Difference, difference, interval, reaches, scores
from benchmarks.accuracy.runs import Record, read
from benchmarks.accuracy.tasks import TASKS

Claimed = Literal["better", "worse", "as good"]
Says = Literal["for", "open", "against"]
PROGRAMS: Mapping[str, Any] = {
    "ablation": ablation,
    "clipping": clipping,
    "convergence": convergence,
    "adamw": adamw,
}
"""Those that leave a line for each run, by the name of their file."""
LEAST = 2
"""Fewest seeds, or rounds, that have an interval."""


class Results(NamedTuple):
    """What the benchmarks have left in this folder."""

    records: Mapping[str, Sequence[Record]]
    """Finished runs by program, of the recipes that the programs have today."""
    raw: Mapping[str, Mapping[str, Any]]
    """The content of NAME.json, by name."""


class Evidence(NamedTuple):
    """One comparison that bears on a claim."""

    text: str
    says: Says


class Compared(NamedTuple):
    """A comparison of two methods on the same seeds, on each task that has both."""

    program: str
    method: str
    reference: str
    claimed: Claimed
    """How the method does, measured by the reference."""
    about: str


class Claim(NamedTuple):
    """A row of the table."""

    text: str
    source: str
    """What the authors say, and where."""
    programs: tuple[str, ...]
    """What measures it, after `python -m benchmarks.`"""
    evidence: Callable[[Results], list[Evidence]]
    missing: str = ""
    """What the programs would need to measure it."""


def judged(task: str, found: Difference, claimed: Claimed) -> Says:
    """Returns what an interval says of a claim about a method, by RULE."""
    down = TASKS[task].metric == "perplexity"
    low, high = (-found.high, -found.low) if down else (found.low, found.high)  # better is up
    if claimed == "worse":
        low, high = -high, -low
    if claimed == "as good" and reaches(task, found):
        return "for"
    if claimed != "as good" and low > 0:
        return "for"
    return "against" if high < 0 else "open"


def verdict(found: Sequence[Evidence]) -> str:
    """Returns the word for all comparisons of a claim together, by RULE."""
    for_it = sum(one.says == "for" for one in found)
    if not found:
        return "not measured"
    if for_it == len(found):
        return "holds"
    return f"holds in part ({for_it} of {len(found)})" if for_it else "not reproduced"


def compared(*comparisons: Compared) -> Callable[[Results], list[Evidence]]:
    """Returns a claim's evidence by comparisons."""
    return lambda results: [one for it in comparisons for one in differences(results.records.get(it.program, []), it)]


def differences(records: Sequence[Record], it: Compared) -> list[Evidence]:
    """Returns what finished runs say of a comparison, task by task, by the seeds that both methods have."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for record in records:
        seeds.setdefault((record.run.task, record.run.method), set()).add(record.run.seed)
    found = []
    for task in dict.fromkeys(record.run.task for record in records):
        both = sorted(seeds.get((task, it.method), set()) & seeds.get((task, it.reference), set()))
        if len(both) < LEAST:
            continue
        own, base = (scores(records, task, method, both) for method in (it.method, it.reference))
        cost = difference(task, own, base)
        unit = "%" if TASKS[task].metric == "perplexity" else "points"
        means = f"{statistics.fmean(own):.2f} for {statistics.fmean(base):.2f}"
        figures = f"{means}, {cost.mean:+.2f} {unit} ({cost.low:+.2f} to {cost.high:+.2f}), {len(both)} seeds"
        found.append(Evidence(f"{task}, {it.about}: {figures}", judged(task, cost, it.claimed)))
    return found


def ratios(results: Results) -> list[Evidence]:
    """Returns how the counted compression ratios compare with the paper's."""
    networks = {name: one for name, one in results.raw.get("wire_ratio", {}).items() if name != "machine"}
    return [
        Evidence(
            f"{name}: {one['ratio']['fp32']:.0f} counted, {one['formula']:.0f} by the paper's format, exact",
            "for" if one["ratio"]["fp32"] >= one["paper"] else "against",
        )
        for name, one in networks.items()
    ]


def speed(rate: str) -> Callable[[Results], list[Evidence]]:
    """Returns the evidence on how many times DGC is as fast as the faster dense exchange, on links of a rate."""

    def found(results: Results) -> list[Evidence]:
        evidence = []
        for run in results.raw.get("network", {}).get("runs", []):
            seconds = run["rates"].get(rate, {})
            times = [
                [dense[i] / seconds["dgc"][i] for i in dense if i in seconds["dgc"]]  # those of the same round
                for name, dense in seconds.items()
                if name in ("ddp", "ddp fp16")
            ]
            times = [one for one in times if len(one) >= LEAST]
            if not times:
                continue
            least, rounds = min((interval(one), len(one)) for one in times)
            says: Says = "for" if least.low > 1 else "against" if least.high < 1 else "open"
            text = f"{run['model']}, {run['ranks']} ranks: {least.mean:.2f} ({least.low:.2f} to {least.high:.2f})"
            evidence.append(Evidence(f"{text} times as fast, {rounds} rounds", says))
        return evidence

    return found


def waits(results: Results) -> list[Evidence]:
    """Returns how many steps ago elements were sent at 0.1 %, when runs ended, against 600 to 1,000."""
    raw = results.raw.get("staleness", {})
    evidence = []
    for task, by_density in raw.get("shares", {}).items():
        shares = by_density["0.001"]["left"]
        edges = [*raw["ages from"], raw["steps"] + 1]
        middle = next(i for i in range(len(shares)) if sum(shares[: i + 1]) >= 0.5)
        first, last = edges[middle], edges[middle + 1] - 1
        says: Says = "for" if first <= 1000 and last >= 600 else "against"
        old = f"{100 * shares[-1]:.0f} % {edges[-2]:,} or more"
        seeds = f"{raw['seeds']} seed{'s' if raw['seeds'] > 1 else ''}, no interval"
        evidence.append(
            Evidence(f"{task}: half of the elements up to {first:,} to {last:,} steps, {old}; {seeds}", says)
        )
    return evidence


def nothing(results: Results) -> list[Evidence]:
    """Returns that no result bears on a claim."""
    return []


def _clipped() -> list[Compared]:
    """Returns the comparisons of local clipping with none, at learning rates at which dense training needs it."""
    return [
        Compared("clipping", name, method._replace(clipped=False).name, "better", f"{name} against not clipped")
        for name, method in clipping.METHODS.items()
        if method.clipped and method.exchange != DENSE and method.lr > clipping.OWN
    ]


ADDED, WHOLE = "added to those above", "the whole method against it without"
SHORT, LONG = "DGC 0.1 %", "DGC 0.1 %, long warm-up"
CLAIMS = (
    Claim(
        "Plain thresholding, which drops what is not sent, is worse than dense",
        "talk: it fails",
        ("accuracy.ablation",),
        compared(
            Compared("ablation", "top-k and nothing else", DENSE, "worse", "against dense"),
            Compared(
                "ablation", "without residual", PAPER, "worse", "the whole method without accumulation against it"
            ),
        ),
    ),
    Claim(
        "Accumulation alone (gradient dropping) still loses",
        "talk: -1.6 points; paper, table 2: -1.00, +0.10, -0.21, -1.00 with 4, 8, 16, 32 workers",
        ("accuracy.ablation",),
        compared(Compared("ablation", "+ residual (gradient dropping)", DENSE, "worse", "against dense")),
    ),
    Claim(
        "Momentum correction helps",
        "talk: -0.36 points are left of the -1.6; paper, 3.2 and figure 3",
        ("accuracy.ablation",),
        compared(
            Compared("ablation", "+ momentum correction", "+ residual (gradient dropping)", "better", ADDED),
            Compared("ablation", PAPER, "without momentum correction", "better", f"{WHOLE} it and masking"),
        ),
    ),
    Claim(
        "Momentum factor masking helps",
        "paper, 3.3: against stale momentum; no figure of its own",
        ("accuracy.ablation", "accuracy.convergence"),
        compared(
            Compared("ablation", "+ masking", "+ momentum correction", "better", ADDED),
            Compared("ablation", PAPER, "without masking", "better", f"{WHOLE} it"),
            Compared("convergence", "DGC 5 %, masked", "DGC 5 %", "better", "at 5 %"),
        ),
    ),
    Claim(
        "Local gradient clipping helps",
        "paper, 3.2; no figure of its own",
        ("accuracy.ablation",),
        compared(
            Compared("ablation", "+ clipping", "+ masking", "better", ADDED),
            Compared("ablation", PAPER, "without clipping", "better", f"{WHOLE} it"),
        ),
    ),
    Claim(
        "Local clipping keeps recurrent networks with momentum from exploding gradients",
        "paper, 3.2: clipping is for recurrent networks; no figure of its own",
        ("accuracy.clipping",),
        compared(*_clipped()),
    ),
    Claim(
        "Warm-up of the density helps",
        "talk: +0.37 points over dense with it; paper, 3.3",
        ("accuracy.ablation", "accuracy.convergence", "accuracy.adamw"),
        compared(
            Compared("ablation", PAPER, "+ clipping", "better", f"{ADDED}, over a tenth"),
            Compared("convergence", LONG, SHORT, "better", "over half in place of a tenth"),
            Compared("adamw", "DGC 0.1 %", "DGC 0.1 %, no warm-up", "better", "over half, AdamW"),
        ),
    ),
    Claim(
        "All together it is better than gradient dropping",
        "paper, table 2: +1.12, +0.26, +0.27, +1.08 points with 4, 8, 16, 32 workers",
        ("accuracy.ablation",),
        compared(Compared("ablation", PAPER, "+ residual (gradient dropping)", "better", "against it")),
    ),
    Claim(
        "At 0.1 % nothing is lost against dense",
        "paper: ResNet-110 +0.12, +0.36, +0.06, +0.08, AlexNet +0.03, ResNet-50 +0.19 points; PTB perplexity 72.24 for "
        "72.30; LibriSpeech WER 9.06 for 9.45",
        ("accuracy.convergence", "accuracy.ablation", "accuracy.adamw"),
        compared(
            Compared("convergence", SHORT, DENSE, "as good", "our defaults, warm-up over a tenth"),
            Compared("convergence", LONG, DENSE, "as good", "our defaults, warm-up over half"),
            Compared("adamw", "DGC 0.1 %", DENSE, "as good", "AdamW, warm-up over half"),
            Compared("ablation", PAPER, DENSE, "as good", "the paper's own setting, a shorter run"),
        ),
    ),
    Claim(
        "At 0.1 % most entries are sent every 600 to 1,000 steps, some wait for 2,000",
        "paper, 3.3: 600 to 1,000; talk: up to 2,000",
        ("accuracy.staleness",),
        waits,
    ),
    Claim(
        "What a worker sends is 277, 597 and 462 times smaller than its gradient",
        "paper, tables 3 and 4: ResNet-50, AlexNet, PTB's LSTM",
        ("cluster.wire_ratio",),
        ratios,
    ),
    Claim(
        "On 1 Gbit/s a step is faster than the faster of DDP's in 32 and in 16 bits",
        "paper, abstract: 1 Gbit/s is enough; figure 6, by a performance model",
        ("training.network",),
        speed("1gbit"),
    ),
    Claim(
        "64 workers train AlexNet 64 times as fast as one",
        "talk; in the paper a performance model of up to 64 workers, no run",
        ("training.network",),
        nothing,
        "on 64 machines, which we do not have; `cluster.scaling` is arithmetic, of other networks",
    ),
)
RULE = """The paper is Lin et al., ICLR 2018; its figures are of one seed. "Talk" are figures that an author gives in
talks of the method, which we take for differences to dense on CIFAR-10, one technique after another; we have found no
slides to check them by. None of the authors' own tasks and networks was trained here. Ours are the small ones of the
sections below, with four workers: accuracy in points for mnist, digits and letters, and perplexity, where less is
better, in per cent for the others. *A for B* are the means of a method and of what it is compared with. To call a
program, write `python -m benchmarks.` in front of its name.

**The rule.** Of each comparison there are the paired difference of equal seeds, its 95 % interval (Student's t), and
what it says. It is *for* a claim where the whole interval lies on the claimed side of zero, *against* it where the
whole interval lies on the other side, and else *open*. For the claim that nothing is lost is an interval that ends
within 0.5 points or 1 %; against it is one that does not, and in which something is lost throughout. Times as fast are
held against 1 in the same way, over rounds; bytes and ages against the figure itself. The sign counts and not the size,
since tasks are others. A claim **holds** where all comparisons are for it, **in part** where some are, and is **not
reproduced** where none is. Without a result it is **not measured**."""


def rows(results: Results, claims: Sequence[Claim] = CLAIMS) -> list[list[str]]:
    """Returns claim, source, evidence and verdict of each claim."""
    table = []
    for claim in claims:
        found = claim.evidence(results)
        programs = ", ".join(f"`{name}`" for name in claim.programs)
        by = programs if found else f"nothing; it takes {programs} {claim.missing}".rstrip()
        measured = "<br>".join([*(f"{one.text}: *{one.says}*" for one in found), by])
        table.append([claim.text, claim.source, measured, f"**{verdict(found)}**"])
    return table


def load(folder: Path) -> Results:
    """Reads the results of a folder; files that are not there are results that do not exist."""
    records = {}
    for name, program in PROGRAMS.items():
        done = read(folder / f"{name}.jsonl")
        seeds = 1 + max((run.seed for run in done), default=-1)
        planned = program.plan([*program.TRAINED], seeds, None)
        records[name] = [done[run] for run in planned if run in done]
    names = ("wire_ratio", "network", "staleness")
    files = {name: path for name in names if (path := folder / f"{name}.json").exists()}
    return Results(records, {name: json.loads(path.read_text()) for name, path in files.items()})


def section(results: Results) -> str:
    """Returns the section of docs/results.md."""
    table = [["claim", "what the authors say", "what is measured here", "verdict"], ["---"] * 4, *rows(results)]
    return "\n\n".join([RULE, "\n".join(f"| {' | '.join(row)} |" for row in table)])
