"""A long run in which everything goes wrong: kills, overflows, discarded steps. Nothing may be lost.

    python benchmarks/soak.py

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
- Memory of the processes of the last start, which no kill ends. All kills come in the first 60 % of the run.

Exits with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import torch
import torch.distributed as dist
from harness import RESULTS, report
from matplotlib import pyplot
from tabulate import tabulate
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dgc
from dgc.schedule import DensitySchedule, entries

SHAPES = {
    "integers": (130, 130),
    "bias": (100,),
    "momentum": (150, 120),
    "small": (60, 20),
    "normals": (260, 260),  # more than one tile
    "more integers": (140, 120),
}
COMPRESSED = ("integers", "momentum", "normals", "more integers")
RANDOM = ("momentum", "normals")
"""Those with normally distributed gradients. Compressed ones only: gloo's dense sums round by how DDP makes its
buckets, and that differs in the first step after a start."""
GROUPS = {
    ("integers", "bias", "small", "more integers"): {"lr": 0.25, "momentum": 0.0},
    ("normals",): {"lr": 0.125, "momentum": 0.0},
    ("momentum",): {"lr": 0.001, "momentum": 0.9},
}
LARGEST = 2  # integer gradients, before they are multiplied with the number of ranks
BLOCK = 25  # steps of a stretch of accumulation or state.dense
INIT_SCALE, GROWTH_INTERVAL = 2.0**16, 35
BAD = 0.02  # share of steps with an Inf or a NaN: the scale falls about as often as it grows
DISCARDED = 0.01
HANGS = 60.0  # seconds in which the survivors of a kill have to end; gloo's own timeout comes later


@dataclass(frozen=True)
class Run:
    """What a run follows from."""

    steps: int
    ranks: int
    kills: int
    seed: int
    save_every: int

    @property
    def config(self) -> dgc.DGCConfig:
        """With a warm-up over a tenth of the run, in which a kill may fall."""
        # Not denser: all-reduce would be cheaper on eight ranks, and the phase dense.
        return dgc.DGCConfig(density=0.01, warmup_steps=self.steps // 10, warmup_densities=(0.1, 0.03))

    def saves_after(self, finished: int) -> bool:
        """Returns whether a checkpoint is due after so many steps."""
        return finished % self.save_every == 0 or finished == self.steps


@dataclass(frozen=True)
class Event:
    """What happens in one step."""

    backwards: int
    """Backward passes, all but the last under no_sync()."""
    dense: bool
    discarded: bool
    bad: tuple[int, str, int, float] | None
    """Rank, parameter, entry and value of a gradient that is not finite."""


def event_of(run: Run, step: int) -> Event:
    """Returns what happens in a step, from 0."""
    block = random.Random(f"{run.seed} block {step // BLOCK}")
    draw = random.Random(f"{run.seed} step {step}")
    accumulates, dense = block.random() < 0.3, block.random() < 0.25
    bad = None
    if draw.random() < BAD:
        name = draw.choice(list(SHAPES))
        value = draw.choice([math.inf, -math.inf, math.nan])
        bad = draw.randrange(run.ranks), name, draw.randrange(math.prod(SHAPES[name])), value
    return Event(
        backwards=2 if accumulates else 1,
        # Not in the first step after a restart; see RANDOM.
        dense=dense and step % run.save_every != 0,
        discarded=draw.random() < DISCARDED,
        bad=bad,
    )


def gradients(run: Run, step: int, rank: int) -> list[dict[str, Tensor]]:
    """Returns the gradients of each backward pass of a step."""
    event = event_of(run, step)
    generator = torch.Generator().manual_seed(random.Random(f"{run.seed} {step} {rank}").getrandbits(63))
    passes = [
        {
            name: torch.randn(shape, generator=generator)
            if name in RANDOM
            else torch.randint(-LARGEST, LARGEST + 1, shape, generator=generator).float() * run.ranks
            for name, shape in SHAPES.items()
        }
        for _ in range(event.backwards)
    ]
    if event.bad is not None and event.bad[0] == rank:
        _, name, entry, value = event.bad
        passes[-1][name].view(-1)[entry] = value
    return passes


class Given(nn.Module):
    """Parameters whose gradients are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            start = torch.randint(-8, 9, shape, generator=generator).float()
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Returns a loss with these gradients."""
        return torch.stack([(self.get_parameter(name) * g).sum() for name, g in given.items()]).sum()


# A worker.


class Trainer:
    """One rank's model and all that is saved with it."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder, self.rank = run, folder, dist.get_rank()
        self.net = Given()
        self.model = DistributedDataParallel(self.net, bucket_cap_mb=0.05, gradient_as_bucket_view=True)
        groups = [{"params": [self.net.get_parameter(n) for n in names], **sgd} for names, sgd in GROUPS.items()]
        self.optimizer = dgc.SGD(groups, lr=0.25)
        self.scaler = GradScaler("cpu", init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL)
        self.state = dgc.DGCState(self.model.named_parameters(), self.optimizer, run.config, grad_scaler=self.scaler)
        self.model.register_comm_hook(self.state, dgc.dgc_hook)

    def step(self, step: int) -> None:
        """Does what event_of() says."""
        event = event_of(self.run, step)
        *first, last = gradients(self.run, step, self.rank)
        self.state.dense = event.dense
        self.optimizer.zero_grad()
        with self.model.no_sync():
            for given in first:
                self.scaler.scale(self.model(given)).backward()
        self.scaler.scale(self.model(last)).backward()
        if event.discarded:
            self.state.discard()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def save(self, finished: int) -> None:
        """Saves after so many steps, and keeps the two latest."""
        own = self.state.state_dict()
        snapshot = {
            "u": own["momentum"]["momentum"].clone(),  # a view of all
            "v": own["residual"]["momentum"].clone(),
            "parameter": self.net.get_parameter("momentum").detach(),
        }
        torch.save(snapshot, self.folder / f"momentum{finished}.{self.rank}.pt")
        directory = self.folder / f"step{finished}"
        if self.rank == 0:
            directory.mkdir(exist_ok=True)
            parts = {key: part.state_dict() for key, part in self._replicated().items()}
            torch.save({**parts, "finished": finished}, directory / "replicated.pt")
        dgc.checkpoint.save(self.state, directory / "dgc")
        if self.rank == 0:
            for old in saved(self.folder)[:-2]:
                shutil.rmtree(self.folder / f"step{old}")

    def load(self, finished: int) -> int:
        """Takes up where save() was called, and returns after how many steps that was."""
        directory = self.folder / f"step{finished}"
        replicated = torch.load(directory / "replicated.pt", weights_only=True)
        for key, part in self._replicated().items():
            part.load_state_dict(replicated[key])
        dgc.checkpoint.load(self.state, directory / "dgc")
        return int(replicated["finished"])

    def _replicated(self) -> dict[str, Any]:
        return {"model": self.net, "optimizer": self.optimizer, "scaler": self.scaler}

    def digest(self) -> int:
        """Returns a number that differs where any bit of the training state does."""
        _ = self.state.stats  # a step that the scaler has left out is taken back by now
        momentum = self.state.memory.momentum
        assert momentum is not None
        tensors = [*self.net.parameters(), self.state.memory.residual, momentum]
        bits = [int(t.detach().view(torch.int32).sum(dtype=torch.int64)) for t in tensors]
        return hash((*bits, self.state.step, self.state.dense, *self.scaler.state_dict().values()))


@dataclass(frozen=True)
class Record:
    """What a rank writes down after every step, and after a restart."""

    attempt: int
    finished: int
    """Steps, from the beginning of the run."""
    digest: int
    resident: int
    """Bytes of resident memory."""
    heap: int
    """Those of them that are no file's."""
    norm: float
    """Of the residual."""


def resident() -> tuple[int, int]:
    """Returns resident memory in bytes, all of it and the part that is no file's."""
    pages = [int(field) for field in Path("/proc/self/statm").read_text().split()]
    size = os.sysconf("SC_PAGE_SIZE")
    return pages[1] * size, (pages[1] - pages[2]) * size


def saved(folder: Path) -> list[int]:
    """Returns after how many steps there are complete checkpoints, the latest last."""
    return sorted(int(path.parent.name[len("step") :]) for path in folder.glob("step*/dgc"))


def worker(rank: int, attempt: int, run: Run, folder: Path, resume: int, progress: Any) -> None:
    """Trains from a checkpoint to the end; progress is n.5 while the checkpoint after n steps is written."""
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / f"store{attempt}"), run.ranks)
        dist.init_process_group(
            "gloo", rank=rank, world_size=run.ranks, store=store, timeout=timedelta(seconds=2 * HANGS)
        )
        trainer = Trainer(run, folder)
        finished = trainer.load(resume) if resume else 0
        with (folder / f"rank{rank}.log").open("a", buffering=1) as log:  # a line is there once it is written

            def record() -> None:
                norm = float(torch.linalg.vector_norm(trainer.state.memory.residual))
                print(attempt, finished, trainer.digest(), *resident(), norm, file=log)
                progress[rank] = finished

            record()
            while finished < run.steps:
                trainer.step(finished)
                finished += 1
                record()
                if run.saves_after(finished):
                    progress[rank] = finished + 0.5
                    trainer.save(finished)
        torch.save(
            {
                "parameters": trainer.net.state_dict(),
                "residual": trainer.state.state_dict()["residual"],
                "applied": trainer.state.step,
                "scale": trainer.scaler.get_scale(),
            },
            folder / f"final{rank}.pt",
        )
        dist.destroy_process_group()
    except Exception as error:
        (folder / f"error{attempt}.{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(3)


# The supervisor.


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
    context.set_forkserver_preload(["torch", "torch.distributed", "dgc"])  # a process then starts in less than a second
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


# What should have come of it.


class Simulation:
    """The parameter with momentum, on all ranks: momentum correction and masking as the paper has them, in float64."""

    def __init__(self, run: Run) -> None:
        (sgd,) = [sgd for names, sgd in GROUPS.items() if "momentum" in names]
        self.lr, self.mu = sgd["lr"], sgd["momentum"]
        self.start = Given().get_parameter("momentum").detach().double()
        self.parameter = self.start.clone()
        self.u = [torch.zeros_like(self.parameter) for _ in range(run.ranks)]
        self.v = [torch.zeros_like(self.parameter) for _ in range(run.ranks)]
        self.schedule = DensitySchedule(run.config)

    def compare(self, snapshots: Sequence[Mapping[str, Tensor]]) -> float:
        """Returns the error as a share of the way since the last snapshots, and goes on from these."""
        end = snapshots[0]["parameter"].double()
        error = float((self.parameter - end).norm() / (end - self.start).norm())
        self.start, self.parameter = end, end.clone()
        self.u = [snapshot["u"].double() for snapshot in snapshots]
        self.v = [snapshot["v"].double() for snapshot in snapshots]
        return error

    def step(self, gradients: Sequence[Tensor], applied: int, left_out: bool, dense: bool) -> None:
        """Takes each rank's gradient; applied is how many steps were, until now."""
        ranks = len(gradients)
        if dense:
            u = sum(self.u, torch.zeros_like(self.parameter)) / ranks
            if not left_out:
                u = self.mu * u + sum(gradients, torch.zeros_like(u)) / ranks
                self.parameter -= self.lr * u
            self.u = [u.clone() for _ in gradients]
            return
        k = entries(self.schedule.density(applied), self.parameter.numel())
        for g, u, v in zip(gradients, self.u, self.v, strict=True):
            finite = g.isfinite()
            u.copy_(torch.where(finite, self.mu * u + g, u))
            v.copy_(torch.where(finite, v + u, v))
            if not left_out:
                sent = v.view(-1).abs().topk(k).indices
                self.parameter.view(-1)[sent] -= self.lr / ranks * v.view(-1)[sent]
                v.view(-1)[sent] = 0
                if not self.schedule.warming_up(applied):
                    u.view(-1)[sent] = 0


@dataclass
class Ledger:
    """What the events of a run add up to."""

    total: dict[str, Tensor] = field(default_factory=lambda: {n: torch.zeros(s).double() for n, s in SHAPES.items()})
    """Sum over the ranks of all gradients that have to be applied or to wait."""
    momentum: float = 0.0
    """The largest error of the parameter with momentum between two checkpoints, as a share of the way."""
    applied: int = 0
    scale: float = INIT_SCALE
    lowest: float = INIT_SCALE
    highest: float = INIT_SCALE
    counts: Counter[str] = field(default_factory=Counter)


def ledger_of(run: Run, folder: Path | None = None) -> Ledger:
    """Adds up all steps, without DGC; compares the snapshots in a folder with the simulation on the way."""
    ledger, simulation = Ledger(), Simulation(run)
    good = 0  # steps since the scale has changed
    for step in tqdm(range(run.steps), desc="ledger", file=sys.stderr):
        event = event_of(run, step)
        left_out = event.discarded or event.bad is not None
        with_momentum = []
        for rank in range(run.ranks):
            first, *others = gradients(run, step, rank)
            for name, total in ledger.total.items():
                g = first[name]
                for other in others:
                    g = g + other[name]
                if name in COMPRESSED and not event.dense:
                    total += g.nan_to_num(0.0, 0.0, 0.0)  # an entry that is not finite is left out by itself
                elif not left_out:
                    total += g
                if name == "momentum":
                    with_momentum.append(g.double())
        simulation.step(with_momentum, ledger.applied, left_out, event.dense)
        ledger.counts["accumulated over two passes"] += event.backwards == 2
        ledger.counts["with state.dense"] += event.dense
        ledger.counts["discarded"] += event.discarded
        ledger.counts["with an Inf or NaN"] += event.bad is not None
        ledger.applied += not left_out
        if folder is not None and run.saves_after(step + 1):
            names = [folder / f"momentum{step + 1}.{rank}.pt" for rank in range(run.ranks)]
            error = simulation.compare([torch.load(name, weights_only=True) for name in names])
            ledger.momentum = max(ledger.momentum, error)
        if event.discarded:
            continue
        good = 0 if event.bad else good + 1
        if event.bad:
            ledger.scale /= 2
        elif good == GROWTH_INTERVAL:
            ledger.scale, good = 2 * ledger.scale, 0
        ledger.lowest, ledger.highest = min(ledger.lowest, ledger.scale), max(ledger.highest, ledger.scale)
    return ledger


def lost(run: Run, results: Sequence[Mapping[str, Any]], ledger: Ledger, name: str) -> Tensor:
    """Returns what is in neither the parameter nor the residual, summed over the ranks; float64."""
    lr = next(sgd["lr"] for names, sgd in GROUPS.items() if name in names)
    start, end = Given().get_parameter(name).detach().double(), results[0]["parameters"][name].double()
    lost: Tensor = ledger.total[name] - run.ranks * (start - end) / lr
    for result in results:
        if name in COMPRESSED:
            lost -= result["residual"][name].double()
    return lost


def records_of(folder: Path, rank: int) -> list[Record]:
    """Reads what a rank has written down."""
    records = []
    for line in (folder / f"rank{rank}.log").read_text().splitlines():
        attempt, finished, digest, size, heap = map(int, line.split()[:-1])
        records.append(Record(attempt, finished, digest, size, heap, float(line.split()[-1])))
    return records


Check = tuple[str, str, str, bool]
"""What was checked, what was expected, what was found, and whether it is that."""


def check(run: Run, folder: Path, kills: Sequence[Kill], ledger: Ledger) -> list[Check]:
    """Returns all verdicts on a run."""
    results = [torch.load(folder / f"final{rank}.pt", weights_only=True) for rank in range(run.ranks)]
    records = [records_of(folder, rank) for rank in range(run.ranks)]
    return [
        check_replicas(results),
        *check_conservation(run, results, ledger),
        check_momentum(ledger),
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
    error = float(lost(run, results, ledger, "normals").norm() / ledger.total["normals"].norm())
    about = f"conservation of normal gradients, {run.ranks} ranks"
    return [*checks, (about, "< 1e-5 of the sum", f"{error:.1e}", error < 1e-5)]


def check_momentum(ledger: Ledger) -> Check:
    """Judges the comparison with the simulation."""
    found = f"{100 * ledger.momentum:.2g} % at most"
    return "momentum 0.9 against a simulation in float64", "< 1 % between checkpoints", found, ledger.momentum < 0.01


def check_counts(results: Sequence[Mapping[str, Any]], ledger: Ledger) -> Check:
    """Compares steps applied and the loss scale with those that the events lead to."""
    expected = f"{ledger.applied:,} and 2^{math.log2(ledger.scale):g}"
    found = {f"{result['applied']:,} and 2^{math.log2(result['scale']):g}" for result in results}
    return "steps applied and last loss scale", expected, "; ".join(sorted(found)), found == {expected}


def check_restarts(run: Run, records: Sequence[Sequence[Record]], kills: Sequence[Kill]) -> list[Check]:
    """Compares what came after each restart with what was there before the kill."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps from one checkpoint to the next")
    parser.add_argument(
        "--smoke", action="store_true", help="300 steps, 2 kills, a checkpoint every 40; writes no file"
    )
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.kills, args.save_every = 300, 2, 40
    if not 40 <= args.steps <= 200_000:
        parser.error(f"--steps: expected 40 to 200,000 (beyond, float32 sums are not exact), got {args.steps}")
    if not 1 <= args.ranks <= 8:
        parser.error(f"--ranks: expected 1 to 8, got {args.ranks}")
    if not 0 <= args.kills <= args.steps // 20:
        parser.error(f"--kills: expected 0 to {args.steps // 20} for {args.steps} steps, got {args.kills}")
    if args.save_every < 1:
        parser.error(f"--save-every: expected 1 or more, got {args.save_every}")
    run = Run(args.steps, args.ranks, args.kills, args.seed, args.save_every)

    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kills = supervise(run, folder)
        seconds = time.monotonic() - begin
        ledger = ledger_of(run, folder)
        checks = check(run, folder, kills, ledger)
        if not args.smoke:
            draw(folder, run, kills, RESULTS / "soak.png")
        memory = [
            [[r.finished, r.resident, r.heap] for r in records_of(folder, rank) if r.attempt == len(kills)][::100]
            for rank in range(run.ranks)
        ]
    passed = all(good for *_, good in checks)
    rows = [[*texts, "pass" if good else "FAIL"] for *texts, good in checks]
    headers = ["check", "expected", "found", "verdict"]
    title = (
        f"Soak: {run.steps:,} steps on {run.ranks} gloo processes, {len(kills)} of them killed, seed {run.seed}, "
        f"{seconds / 60:.0f} minutes: {'pass' if passed else 'FAIL'}."
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
        report("soak", title, headers, rows, raw, more)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
