"""Training steps on a real network of 10 Gbit/s, 1 Gbit/s and 100 Mbit/s, against what else there is.

    sudo python -m benchmarks.training.network

Every rank is a process of one thread in a network namespace of its own, and what it sends and receives is limited
(namespaces.py says how, and that nothing is left behind). That needs root, or, where the system allows it, what
`unshare --user --map-root-user --net` in front of the command makes of a user. Without, everything runs once, marked as
such, on an unlimited loopback.

Competitors (competitors.py) take turns, step by step, with a barrier before each that is not in the time; a step's time
is the slowest rank's, and holds zero_grad, forward, backward and the optimizer's step. All have
gradient_as_bucket_view=True, and the allocator's settings of launch/torchrun.sh. The first steps, with DDP's rebuilt
buckets and PowerSGD's dense ones, run without a limit and are not timed. In each setting all competitors have the same
share of --seconds, but at least 3 steps each; no_sync has at least 5, and one in every round. A ratio is that of two
competitors in the same round.

Four ranks on fewer cores compute in turns, so there is more time to hide an exchange behind: only ratios mean anything.

Bytes are those of Ethernet frames that leave a rank, counted by the kernel around a block of steps, the TCP
acknowledgements for what it receives among them; `stats` is what dgc's state.stats.bytes_sent says of tensors alone.

Only the run of all settings writes results/network.{md,json,png}; others write with --out NAME.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm

from benchmarks import architectures
from benchmarks.harness import keep_freed_memory

from .competitors import NAMES, WARM_UP, Competitor, competitor
from .links import namespaces
from .links.report import report

RATES, RANKS = ("10gbit", "1gbit", "100mbit"), (2, 4)
UNLIMITED = "unlimited"
BLOCK = 5  # steps between two readings of the counter
MOST = 40  # timed steps of a competitor in a setting
START_UP = 35  # seconds until ranks are warm, about, on two cores

Loss = Callable[[nn.Module], Tensor]


def task(name: str, generator: torch.Generator) -> tuple[nn.Module, Loss]:
    """Returns a model, the same on all ranks, and a loss on random data of the generator's own."""
    torch.manual_seed(0)

    def words(batch: int, time: int) -> Loss:
        text = torch.randint(5000, (batch, time + 1), generator=generator)
        return lambda model: cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    if name == "lstm":
        return architectures.LSTM(vocabulary=5000, width=256, layers=2), words(16, 32)
    if name == "gpt":
        return architectures.GPT(vocabulary=5000, width=256, depth=4, heads=4, context=64), words(4, 64)
    if name == "resnet":
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        return architectures.ResNet(3, 10, (64, 128, 256)), lambda model: cross_entropy(model(images), labels)
    widths, batch = ((2048,) * 4, 64) if name == "mlp" else ((256,) * 3, 4)
    x, y = (torch.randn(batch, widths[0], generator=generator) for _ in range(2))
    return architectures.mlp(*widths), lambda model: mse_loss(model(x), y)


MODELS = ("mlp", "resnet", "lstm", "gpt")


def timed(step: Callable[[], object]) -> float:
    """Returns the seconds of one step that all ranks begin together."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def slowest(seconds: list[float]) -> list[float]:
    """Returns the largest of all ranks, element by element."""
    tensor = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def bytes_a_step(link: namespaces.Link, step: Callable[[], object]) -> float:
    """Returns the bytes of frames that left a rank in a step, on average over ranks and a block of steps."""
    dist.barrier()
    before = link.sent()
    dist.barrier()
    for _ in range(BLOCK):
        step()
    dist.barrier()
    sent = torch.tensor(float(link.sent() - before))
    dist.all_reduce(sent)
    return sent.item() / BLOCK / dist.get_world_size()


def reached(link: namespaces.Link, rate: str) -> float:
    """Returns the Mbit/s, of frames, at which a rank sends in an all-reduce of 50 ms: median of 3."""
    tensor = torch.zeros(namespaces.bits(rate) // 8 // 4 // 20)
    measured = []
    for _ in range(3):
        before = link.sent()
        [seconds] = slowest([timed(lambda: dist.all_reduce(tensor))])
        measured.append((link.sent() - before) * 8 / seconds / 1e6)
    return statistics.median(measured)


def rounds(estimates: list[float], seconds: float) -> list[list[int]]:
    """Returns which competitors take part in each round, so that each has about the same share of the seconds."""
    counts = [min(max(int(seconds / len(estimates) / estimate), 3), MOST) for estimate in estimates]
    counts[NAMES.index("no_sync")] = total = max(*counts, 5)
    # By the bits in reverse order: the first n are spread evenly, and rounds of few steps are among those of many.
    order = sorted(range(total), key=lambda r: f"{r:016b}"[::-1])
    taken = [set(order[:count]) for count in counts]
    return [[i for i, present in enumerate(taken) if r in present] for r in range(total)]


def measure(competitors: list[Competitor], seconds: float) -> dict[str, dict[int, float]]:
    """Returns each competitor's seconds, by round."""
    estimates = slowest([timed(c.step) for c in competitors])  # TCP finds its pace, too
    plan = rounds(estimates, seconds)
    times = [(i, r, timed(competitors[i].step)) for r, present in enumerate(plan) for i in present]
    result: dict[str, dict[int, float]] = {c.name: {} for c in competitors}
    for (i, r, _), worst in zip(times, slowest([t for *_, t in times]), strict=True):
        result[competitors[i].name][r] = worst
    return result


def worker(rank: int, ranks: int, model: str, rates: list[str], args: argparse.Namespace, folder: str) -> None:
    """Measures all rates on one rank."""
    torch.set_num_threads(1)
    limited = rates != [UNLIMITED]
    link = namespaces.Link(rank) if limited else None
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(f"{folder}/store", ranks))
    generator = torch.Generator().manual_seed(rank)
    competitors = []
    for name in NAMES:
        module, loss = task(model, generator)
        competitors.append(competitor(name, module, loss, gradient_as_bucket_view=True))
    for _ in range(WARM_UP):
        for c in competitors:
            c.step()
    stats = next(c.state.stats.bytes_sent for c in competitors if c.state)
    result: dict[str, Any] = {"rates": {}, "bytes": {}, "stats": stats, "reached": {}}
    result["shapes"] = {n: list(p.shape) for n, p in competitors[0].model.module.named_parameters()}
    result["parameters"] = sum(p.numel() for p in competitors[0].model.parameters())
    for rate in rates:
        if link:
            link.limit(rate, args.latency)
            dist.barrier()
            result["bytes"] = result["bytes"] or {c.name: bytes_a_step(link, c.step) for c in competitors}
            result["reached"][rate] = reached(link, rate)
        result["rates"][rate] = measure(competitors, args.seconds)
        if rank == 0:
            Path(folder, f"{rate}.done").touch()
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, model: str, rates: list[str], args: argparse.Namespace, bar: Any) -> dict[str, Any]:
    """Returns what `worker` measures, from ranks that live no longer than this call."""
    cables = nullcontext() if rates == [UNLIMITED] else namespaces.switch()
    with cables, tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(worker, (ranks, model, rates, args, folder), ranks, join=False)
        done = 0
        while not processes.join(timeout=1):
            if (now := len(list(Path(folder).glob("*.done")))) > done:
                bar.update(now - done)
                done = now
        bar.update(len(rates) - done)
        result: dict[str, Any] = torch.load(f"{folder}/result.pt")
    return {"ranks": ranks, "model": model, **result}


def parsed() -> argparse.Namespace:
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="of each direction, as tc writes them")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[*MODELS, "tiny"])
    parser.add_argument("--seconds", type=float, default=20, help="for the timed steps of a setting, about")
    parser.add_argument("--latency", type=float, default=0, help="ms in each direction; needs netem in the kernel")
    parser.add_argument("--out", help="name under results/; default: network if all settings run, else nothing")
    parser.add_argument("--smoke", action="store_true", help="2 ranks, 1 rate, a tiny model: that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.ranks, args.rates, args.models, args.seconds = [2], ["100mbit"], ["tiny"], 0.5
    try:
        list(map(namespaces.bits, args.rates))
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    """Measures and reports."""
    args = parsed()
    rates = args.rates
    missing = namespaces.missing()
    if missing:
        print(f"NO LIMITS: {missing}. All runs on an unlimited loopback; limits need root.", file=sys.stderr)
        rates = [UNLIMITED]
    elif args.latency and not namespaces.has_netem():
        sys.exit("--latency: this kernel has no netem (CONFIG_NET_SCH_NETEM)")
    elif not args.latency:
        print("Latency is not set: that of the kernel, some 0.05 ms.", file=sys.stderr)
    full = not missing and set(rates) >= set(RATES) and set(args.ranks) >= set(RANKS)
    full = full and set(args.models) >= set(MODELS) and not args.latency
    name = args.out or ("network" if full else None)
    runs, settings = len(args.ranks) * len(args.models), len(args.ranks) * len(args.models) * len(rates)
    keep_freed_memory()
    if not args.smoke:
        minutes = (runs * START_UP + settings * args.seconds * 1.3) / 60
        print(f"{settings} settings, about {minutes:.0f} minutes on two cores", file=sys.stderr)
    with tqdm(total=settings, desc="settings", file=sys.stderr) as bar:
        measured = [run(ranks, model, rates, args, bar) for ranks in args.ranks for model in args.models]
    report(name, measured, latency_ms=args.latency)


if __name__ == "__main__":
    main()
