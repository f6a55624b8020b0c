"""The compression step on one GPU: ours against the memory it has to move, and against what PyTorch users run today.

    python -m benchmarks.kernels.ops --device cuda

Needs the CUDA kernels of this package, and nvcc for rivals.cu. The limits:

  copy             of a tensor: what memory gives, and so what the step's 20 bytes an element cost at the least
  floor            u and v updated by a plain kernel, nothing selected; floor Adam: m, s and v by Adam's rule
  zero fill        of the gradient

Ours, after a check of every byte they write against plain PyTorch:

  dgc              the fused op; bf16: of bfloat16 gradients; graph: replayed from a CUDA graph; Adam: by Adam's rule
  unpack 8         of 8 ranks' payloads

The rivals, all on one segment but the last:

  eager exact      the same step in six PyTorch calls
  sampled          the official code's way: the threshold of a 1 % sample, then raised or lowered by 1.3 or 0.7, up to
                   ten times, until 0.8 k to 1.3 k entries reach it, which the host has to count
  cub topk         an update that also writes |v|, cub::DeviceTopK of that, gather and zero; "lazy": nothing is written,
                   DeviceTopK takes |v| as it reads v. Needs CCCL 3.2: pip install 'nvidia-cuda-cccl>=13.2.86'
  powersgd         PyTorch's, of rank 4, matrix by matrix as its hook does: two products, one orthogonalisation, error
                   feedback; no all-reduce

All start from the same u and v, as 20 steps of DGC leave them, and take gradients in turn that together exceed the L2
cache. A time is what passes on the GPU between two events, for each call in between: where the host is slower than the
GPU, the host's.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import dgc
from benchmarks.harness import ratio, report, shown
from dgc import ops
from dgc.cli.shapes import NETWORKS, matrices
from dgc.ops import Accumulation, reference, wire
from dgc.step.schedule import entries

from .rivals import DEVICE, CubTopK, Library, PowerSGD, Sampled, Shape, loud
from .steps import EagerExact, Floor, Fused

RANKS = 8
LAYERED = 100_000_000
MAX_CALLS, SECONDS_OF_CALLS = 20, 0.010
"""Calls between two events: as many as take about so long."""
MIN_ROUNDS = 3
SIZES, ROUNDS = [1_000_000, 10_000_000, LAYERED, 1_000_000_000], 20
SECONDS = 130
"""After which rounds are cut short."""
RIVALS = ("eager exact", "sampled", "cub topk", "cub topk lazy", "powersgd")
TARGETS = {
    ("1,000,000", "dgc graph"): 0.030,
    ("100,000,000", "dgc"): 0.56,
    ("1,000,000,000", "dgc"): 5.3,
    ("ResNet-50", "dgc"): 0.60,
    ("GPT-2 small", "dgc"): 0.60,
    ("100,000,000", "unpack 8"): 0.13,
    ("1,000,000,000", "unpack 8"): 1.1,
}
"""Milliseconds, on an H200."""
LIMITS = (
    "elements",
    "copy TB/s",
    "20 B/element",
    "floor",
    "dgc",
    "dgc / floor",
    "dgc bf16",
    "dgc graph",
    "unpack 8",
    "zero fill",
    "dgc Adam",
    "Adam: dgc / floor",
)

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A bucket to measure: a name, the elements of its segments, and the matrices that PowerSGD sees in it."""

    label: str
    numels: list[int]
    shapes: list[Shape]

    @property
    def numel(self) -> int:
        """Elements of the bucket."""
        return sum(self.numels)


def single(n: int) -> Case:
    """Returns n elements in one segment; PowerSGD gets a matrix that is nearly square, its rows aligned."""
    columns = max(32, math.isqrt(n) // 32 * 32)
    return Case(f"{n:,}", [n], [(n // columns, columns)])


def layered(label: str, shapes: Sequence[Shape]) -> Case:
    """Returns the layers of a network that DGC compresses, again and again until they have 100M elements."""
    compressed = [shape for shape in shapes if math.prod(shape) >= dgc.DGCConfig().dense_below]
    ends = itertools.accumulate(math.prod(shape) for shape in itertools.cycle(compressed))
    count = 1 + sum(1 for _ in itertools.takewhile(lambda end: end < LAYERED, ends))
    layers = list(itertools.islice(itertools.cycle(compressed), count))
    return Case(label, [math.prod(shape) for shape in layers], layers)


def captured(fused: Fused) -> list[torch.cuda.CUDAGraph]:
    """Returns the step as a CUDA graph, one for each gradient, since a graph keeps addresses."""
    graphs, side = [], torch.cuda.Stream()
    for gradient in fused.gradients:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            fused.step(gradient)
        graphs.append(graph)
    return graphs


class Bench:
    """One case on the GPU: rotating gradients, u and v as DGC leaves them, and the competitors."""

    def __init__(self, case: Case, density: float) -> None:
        self.case = case
        torch.manual_seed(0)
        n = case.numel
        rows, offset, state = [], 0, 0
        for numel in case.numels:  # gradients without gaps, u and v at multiples of 32 elements, as in training
            rows.append([0, offset, state, numel, entries(density, numel)])
            offset, state = offset + numel, wire.align_up(state + numel, wire.GROUP)
        self.segments = torch.tensor(rows)
        # The bfloat16 ones alone, too, are more than the L2 cache.
        count = max(2, math.ceil(3 * torch.cuda.get_device_properties(DEVICE).L2_cache_size / (4 * n)))
        self.gradients = [torch.randn(n, device=DEVICE) for _ in range(count)]
        self.u, self.v = torch.zeros(state, device=DEVICE), torch.zeros(state, device=DEVICE)
        self.fused = Fused(self.gradients, [self.u], self.v, self.segments)
        # DGC cuts v off just above the threshold: time it on what it leaves behind, not on fresh noise.
        for _ in range(20):
            self.fused.step(self.gradients[0].normal_())
        self.halves = Fused([g.bfloat16() for g in self.gradients], [self.u], self.v, self.segments)
        self.adam = Fused(
            self.gradients,
            [torch.zeros(state, device=DEVICE) for _ in range(2)],
            torch.zeros(state, device=DEVICE),
            self.segments,
            Accumulation.ADAM,
        )
        for _ in range(20):
            self.adam.step(self.gradients[0].normal_())
        self.graphs = captured(self.fused)
        self.payloads = torch.zeros(RANKS, self.fused.payload.numel(), dtype=torch.uint8, device=DEVICE)
        for payload in self.payloads:
            self.fused()
            payload.copy_(self.fused.payload)
        self.outs = [torch.empty(n, device=DEVICE) for _ in range(count)]
        self.status = torch.zeros(RANKS + 1, dtype=torch.int32, device=DEVICE)
        self._check()
        self.changing = [self.u, self.v, *self.adam.kept, self.adam.v]
        self.start = [t.clone() for t in self.changing]

    def restore(self) -> None:
        """Brings back what is kept and v, from which all start."""
        torch._foreach_copy_(self.changing, self.start)

    def ours(self, library: Library) -> dict[str, Run]:
        """Returns our ops and their limits."""
        u, v = self.state()
        replays, pairs = itertools.cycle(self.graphs), itertools.cycle(zip(self.outs, self.gradients, strict=True))

        def copy() -> None:
            out, gradient = next(pairs)
            out.copy_(gradient)

        return {
            "copy": copy,
            "floor": Floor(self.gradients, [u], v, library.update),
            "dgc": self.fused,
            "floor Adam": Floor(self.gradients, self.adam.kept, self.adam.v, library.update_adam),
            "dgc Adam": self.adam,
            "dgc bf16": self.halves,
            "dgc graph": lambda: next(replays).replay(),
            "zero fill": lambda: next(pairs)[0].zero_(),
            "unpack 8": lambda: self.unpack(next(pairs)[0]),
        }

    def rivals(self, library: Library) -> dict[str, Callable[[], Run]]:
        """Returns what makes each rival: they need memory of their own."""
        gradients, k = self.gradients, self.fused.k
        u, v = self.state()
        makers: dict[str, Callable[[], Run]] = {"powersgd": lambda: PowerSGD(gradients, self.outs[0], self.case.shapes)}
        if len(self.case.numels) == 1:
            makers["eager exact"] = lambda: self._exact(EagerExact(gradients, u, v, k))
            makers["sampled"] = lambda: Sampled(gradients, u, v, k)
            if library.has_topk:
                makers["cub topk"] = lambda: self._exact(CubTopK(gradients, u, v, k, library))
                makers["cub topk lazy"] = lambda: self._exact(CubTopK(gradients, u, v, k, library, lazy=True))
        return makers

    def state(self) -> tuple[Tensor, Tensor]:
        """Returns u and v without what aligns their end."""
        return self.u[: self.case.numel], self.v[: self.case.numel]

    def unpack(self, out: Tensor) -> None:
        """Averages all ranks' payloads."""
        ops.unpack(
            self.payloads, 0, self.segments, self.fused.workspace, self.fused.one, torch.float32, [out], self.status
        )

    def _check(self) -> None:
        """Checks all that ours write against plain PyTorch, so exactly k entries, and none left that is larger.

        Raises:
            RuntimeError: a byte differs.
        """
        gradient, half = self.gradients[0], self.halves.gradients[0]
        checks: list[tuple[str, Fused, Tensor, Run]] = [
            ("dgc", self.fused, gradient, lambda: self.fused.step(gradient)),
            ("dgc bf16", self.halves, half, lambda: self.halves.step(half)),
            ("dgc graph", self.fused, gradient, self.graphs[0].replay),
            ("dgc Adam", self.adam, gradient, lambda: self.adam.step(gradient)),
        ]
        for name, fused, g, run in checks:
            kept = [t.clone() for t in fused.kept]
            v, payload = fused.v.clone(), fused.payload.clone()
            sent = None if fused.sent is None else fused.sent.clone()
            run()
            reference.compress_(
                [g.clone()],  # it uses the gradient up
                fused.rule,
                kept,
                v,
                fused.segments,
                fused.numbers,
                fused.one,
                payload,
                fused.workspace,
                sent,
                torch.float32,
            )
            for i, (ours, expected) in enumerate(zip(fused.kept, kept, strict=True)):
                self._expect(f"{name}: kept {i}", ours, expected)
            self._expect(f"{name}: v", fused.v, v)
            self._expect(f"{name}: payload", fused.payload, payload)
            if fused.sent is not None and sent is not None:
                self._expect(f"{name}: sent u", fused.sent, sent)
        out, status = torch.zeros_like(self.outs[0]), torch.ones_like(self.status)
        self.unpack(self.outs[0])
        reference.unpack(
            self.payloads, 0, self.segments, self.fused.workspace, self.fused.one, torch.float32, [out], status
        )
        self._expect("unpack: status", self.status, status)
        self._expect("unpack: gradient", self.outs[0], out)

    def _expect(self, what: str, ours: Tensor, expected: Tensor) -> None:
        if not torch.equal(ours, expected):
            differ = f"{int((ours != expected).sum()):,} of {ours.numel():,} differ from plain PyTorch's"
            raise RuntimeError(f"{self.case.label}, {what}: {differ}, so nothing is measured")

    def _exact(self, step: Run) -> Run:
        """Checks that a rival leaves as many zeros in v as ours, and nothing larger, and returns it."""
        left = []
        for run in (lambda: self.fused.step(self.gradients[1]), step):  # a step's first gradient is this one
            self.restore()
            run()
            left.append((int(self.v.count_nonzero()), float(torch.linalg.vector_norm(self.v, math.inf))))
        if left[0] != left[1]:
            raise RuntimeError(f"leaves (entries, largest) {left[1]} in v, expected {left[0]}")
        return step


@dataclass(frozen=True)
class Times:
    """Seconds a call of each competitor, by round; and why others have none."""

    seconds: dict[str, list[float]]
    missing: dict[str, str]

    def cell(self, name: str, target: float | None = None) -> str:
        """Returns milliseconds as the tables show them."""
        if name not in self.seconds:
            return self.missing.get(name, "")
        ms = 1000 * statistics.median(self.seconds[name])
        return (f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}") + ("" if target is None else f" (target {target:g})")

    def against(self, name: str, to: str) -> str:
        """Returns a ratio with its spread; empty where one was not measured."""
        return shown(*ratio(self.seconds, name, to)) if {name, to} <= self.seconds.keys() else ""


def measure(bench: Bench, library: Library, rounds: int, until: float) -> Times:
    """Times every competitor once a round, in turn, so that a GPU that slows down slows all of them.

    The first round warms up and finds out how many calls to time; it is not counted. After the time `until` there are
    no more rounds than MIN_ROUNDS. A rival that fails or finds no memory is left out.
    """
    runs, makers = bench.ours(library), bench.rivals(library)
    times = Times({name: [] for name in [*runs, *makers]}, {})
    calls = dict.fromkeys(times.seconds, 1)
    for round_index in tqdm(range(rounds + 1), desc=bench.case.label, file=sys.stderr):
        if round_index > MIN_ROUNDS and time.monotonic() > until:
            break
        for name in list(times.seconds):
            try:
                if name not in runs:
                    runs[name] = makers[name]()
                    runs[name]()
                seconds = timed(runs[name], calls[name], bench.restore)
            except RuntimeError as error:
                if name not in makers:
                    raise
                loud(f"{bench.case.label}, {name}: {error}")
                times.missing[name] = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else "failed"
                del times.seconds[name]
                runs.pop(name, None)
                continue
            if round_index:
                times.seconds[name].append(seconds)
            else:
                calls[name] = max(1, min(MAX_CALLS, round(SECONDS_OF_CALLS / seconds)))
    return times


def timed(run: Run, calls: int, restore: Run) -> float:
    """Returns the seconds of one of some calls in a row, after one that is not counted."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    restore()
    run()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000 / calls


def limits_row(case: Case, times: Times) -> list[str]:
    """Returns the first table's cells of a case, but its label."""
    copy = statistics.median(times.seconds["copy"]) if "copy" in times.seconds else None
    return [
        "" if copy is None else f"{8 * case.numel / copy / 1e12:.2f}",
        "" if copy is None else f"{1000 * copy * 20 / 8:.3g}",
        times.cell("floor"),
        times.cell("dgc", TARGETS.get((case.label, "dgc"))),
        times.against("dgc", "floor"),
        times.cell("dgc bf16"),
        times.cell("dgc graph", TARGETS.get((case.label, "dgc graph"))),
        times.cell("unpack 8", TARGETS.get((case.label, "unpack 8"))),
        times.cell("zero fill"),
        times.cell("dgc Adam"),
        times.against("dgc Adam", "floor Adam"),
    ]


def rival_cell(times: Times, name: str) -> str:
    """Returns a cell of the second table."""
    if name == "dgc" or name not in times.seconds:
        return times.cell(name)
    return f"{times.cell(name)} ({ratio(times.seconds, name, 'dgc')[0]:.1f}x)"


def main(sizes: Sequence[int], density: float, rounds: int) -> None:
    """Measures and reports.

    Args:
        sizes: elements; with 100M among them, layers of real networks too.
        density: share of the entries that is sent.
        rounds: timed rounds of each size.

    Raises:
        SystemExit: there is no GPU, no kernel for it, or no nvcc.
        RuntimeError: a kernel writes something else than plain PyTorch.
    """
    if not torch.cuda.is_available():
        raise SystemExit(f"ops_cuda.py measures a GPU, and torch {torch.__version__} finds none here")
    if dgc.backend(DEVICE) == "reference":
        raise SystemExit("ops_cuda.py measures CUDA kernels, and dgc was built without: install it with nvcc, or CuPy")
    begin = time.monotonic()
    library = Library()
    cases = [single(n) for n in sizes]
    if LAYERED in sizes:
        cases += [layered(name, matrices(NETWORKS[name]())) for name in ("ResNet-50", "GPT-2 small")]
    cases.sort(key=lambda case: case.numel)  # a size that does not fit comes last
    limits, against, raw = [], [], {}
    for done, case in enumerate(cases):
        now = time.monotonic()
        until = now + (begin + SECONDS - now) / (len(cases) - done)
        try:
            times = measure(Bench(case, density), library, rounds, until)
        except torch.cuda.OutOfMemoryError as error:
            loud(f"{case.label} is left out: {error}")
            times = Times({}, {"dgc": "out of memory"})
        torch.cuda.empty_cache()
        raw[case.label] = {
            "elements": case.numel,
            "segments": len(case.numels),
            "seconds": times.seconds,
            "missing": times.missing,
        }
        label = case.label
        if len(case.numels) > 1:
            label += f": {case.numel:,} in {len(case.numels)} layers"
        limits.append([label, *limits_row(case, times)])
        against.append([label, *(rival_cell(times, name) for name in ("dgc", *RIVALS))])
        tqdm.write(f"{limits[-1]}\n{against[-1]}", file=sys.stderr)  # in case a larger size fails
    note = "" if library.has_topk else " cub topk was left out: nvcc found no CCCL 3.2 or later."
    report(
        "ops_cuda",
        f"Compression step on a GPU, density {100 * density:g} %: milliseconds, medians of at most {rounds} rounds; "
        "dgc / floor: round by round, lowest to highest. 20 B/element: the time of 20 bytes an element at the speed of "
        "copy. Targets are for an H200. Host time is part of it, except in a graph.",
        LIMITS,
        limits,
        {"density": density, "cases": raw},
        [(f"Rivals in the same run, milliseconds (times dgc).{note}", ["elements", "dgc", *RIVALS], against)],
    )
