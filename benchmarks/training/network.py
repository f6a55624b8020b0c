"""Training steps on a real network of 10 Gbit/s, 1 Gbit/s and 100 Mbit/s, against what else there is.

    sudo python -m benchmarks.training.network
    sudo python -m benchmarks.training.network --nodes 2x2 2x4

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

--only names some of the competitors, no_sync and dgc among them: beside fewer others in one process each is faster.
"dgc door" is dgc on a module without DDP, "dgc auto" dgc with exchange="auto", which chooses anew at each rate, by
steps of its own before the timed ones. Both take part only so.

With --nodes, two nodes of two ranks and so on, a namespace is a node's. Its ranks share the one limited link and reach
each other over the loopback; the rates are 1 Gbit/s, 100 Mbit/s and `open`, a limit of 100 Gbit/s that nothing here
comes near and that counts the frames. node_competitors.py has the competitors. Bytes are then those that leave a node.

Only the run of all settings writes results/network.{md,json,png}, or network_nodes with --nodes; others write with
--out NAME.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm

from benchmarks import architectures
from benchmarks.harness import keep_freed_memory, result_name

from .competitors import AUTO, DOOR, NAMES, WARM_UP, Competitor, competitor
from .links import namespaces
from .links.meter import OPEN, bytes_a_step, limit_of, reached, slowest, timed
from .links.report import report
from .links.report_nodes import report_nodes
from .node_competitors import NODE_NAMES, competitor_in_nodes

RATES, RANKS, MODELS = ("10gbit", "1gbit", "100mbit"), (2, 4), ("mlp", "resnet", "lstm", "gpt")
NODE_RATES, NODES, NODE_MODELS = (OPEN, "1gbit", "100mbit"), ("2x2", "2x4"), ("mlp", "gpt")
UNLIMITED = "unlimited"
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


def rounds(estimates: list[float], seconds: float) -> list[list[int]]:
    """Returns which competitors take part in each round, so that each has about the same share of the seconds.

    The first competitor, the limit, takes part in all.
    """
    counts = [min(max(int(seconds / len(estimates) / estimate), 3), MOST) for estimate in estimates]
    counts[0] = total = max(*counts, 5)
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


def built(model: str, places: int | None, loss_of: torch.Generator, only: list[str]) -> list[Competitor]:
    """Returns the competitors, each with a model of its own; with places, those of nodes of so many ranks."""
    if places is None:
        return [competitor(name, *task(model, loss_of), gradient_as_bucket_view=True) for name in only]
    shape = (dist.get_world_size() // places, places)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return [competitor_in_nodes(name, *task(model, loss_of), mesh) for name in NODE_NAMES]


def worker(
    rank: int, ranks: int, places: int | None, model: str, rates: list[str], args: argparse.Namespace, folder: str
) -> None:
    """Measures all rates on one rank, whose node has so many places; None where each rank has a cable of its own."""
    torch.set_num_threads(1)
    limited = rates != [UNLIMITED]
    link, links = None, ranks // (places or 1)
    if limited:
        link = namespaces.Link(rank) if places is None else namespaces.node_link(*divmod(rank, places), folder)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(f"{folder}/store", ranks))
    shapes = {n: list(p.shape) for n, p in task(model, torch.Generator())[0].named_parameters()}
    competitors = built(model, places, torch.Generator().manual_seed(rank), args.only)
    for _ in range(WARM_UP):
        for c in competitors:
            c.step()
    own = {c.name: c.state.stats.bytes_sent for c in competitors if c.state}
    result: dict[str, Any] = {"rates": {}, "bytes": {}, "stats": own["dgc"], "reached": {}, "shapes": shapes}
    result["parameters"] = sum(math.prod(shape) for shape in shapes.values())
    if places:
        total = torch.tensor([*own.values()])
        dist.all_reduce(total)
        result["stats"] = dict(zip(own, (total // links).tolist(), strict=True))
    for rate in rates:
        if limited:
            if link:
                link.limit(limit_of(rate), args.latency)
            dist.barrier()
        for c in competitors:
            c.settle()
        if limited:
            result["bytes"] = result["bytes"] or {c.name: bytes_a_step(link, c.step, links) for c in competitors}
            result["reached"][rate] = reached(link, rate)
        result["rates"][rate] = measure(competitors, args.seconds)
        if rank == 0:
            Path(folder, f"{rate}.done").touch()
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(
    ranks: int, places: int | None, model: str, rates: list[str], args: argparse.Namespace, bar: Any
) -> dict[str, Any]:
    """Returns what `worker` measures, from ranks that live no longer than this call."""
    cables = nullcontext() if rates == [UNLIMITED] else namespaces.switch()
    with cables, tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(worker, (ranks, places, model, rates, args, folder), ranks, join=False)
        done = 0
        while not processes.join(timeout=1):
            if (now := len(list(Path(folder).glob("*.done")))) > done:
                bar.update(now - done)
                done = now
        bar.update(len(rates) - done)
        result: dict[str, Any] = torch.load(f"{folder}/result.pt")
    nodes = {} if places is None else {"nodes": f"{ranks // places}x{places}"}
    return {"ranks": ranks, **nodes, "model": model, **result}


def layout_of(text: str) -> tuple[int, int]:
    """Returns ranks, and ranks of a node, of a layout such as 2x4.

    Raises:
        ValueError: it is none, or a node is alone.
    """
    nodes, _, places = text.partition("x")
    if not (nodes.isdigit() and places.isdigit() and int(nodes) > 1 and int(places) > 0):
        raise ValueError(f"nodes: expected two nodes or more by ranks of a node, such as 2x4, got {text!r}")
    return int(nodes) * int(places), int(places)


def parsed() -> argparse.Namespace:
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", help="of each direction, as tc writes them")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--nodes", nargs="*", help="nodes by ranks of a node, in place of --ranks; default 2x2 2x4")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "tiny"])
    parser.add_argument(
        "--only", nargs="+", choices=[*NAMES, DOOR, AUTO], default=list(NAMES), help="of the competitors"
    )
    parser.add_argument("--seconds", type=float, default=20, help="for the timed steps of a setting, about")
    parser.add_argument("--latency", type=float, default=0, help="ms in each direction; needs netem in the kernel")
    parser.add_argument(
        "--out", type=result_name, help="name under results/; default: network if all settings run, else nothing"
    )
    parser.add_argument("--smoke", action="store_true", help="2 ranks, 1 rate, a tiny model: that it runs")
    args = parser.parse_args()
    in_nodes = args.nodes is not None
    if args.only[0] != "no_sync" or "dgc" not in args.only:
        parser.error(f"--only: expected no_sync first, and dgc, got {' '.join(args.only)}")
    if args.smoke:
        args.rates, args.models, args.seconds = ["100mbit"], ["tiny"], 0.5
        args.ranks, args.nodes = [2], ["2x2"] if in_nodes else None
    args.rates = args.rates or list(NODE_RATES if in_nodes else RATES)
    args.models = args.models or list(NODE_MODELS if in_nodes else MODELS)
    try:
        for rate in args.rates:
            namespaces.bits(limit_of(rate))
        args.layouts = (
            [layout_of(text) for text in args.nodes or NODES] if in_nodes else [(n, None) for n in args.ranks]
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def complete(args: argparse.Namespace) -> bool:
    """Returns whether all settings run."""
    if args.nodes is None:
        all_of = set(args.rates) >= set(RATES) and set(args.ranks) >= set(RANKS) and set(args.models) >= set(MODELS)
    else:
        all_of = set(args.rates) >= set(NODE_RATES) and set(args.models) >= set(NODE_MODELS)
        all_of = all_of and set(args.layouts) >= {layout_of(text) for text in NODES}
    return all_of and not args.latency and args.only == list(NAMES)


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
    whole = "network" if args.nodes is None else "network_nodes"
    name = args.out or (whole if complete(args) and not missing else None)
    runs = len(args.layouts) * len(args.models)
    settings = runs * len(rates)
    keep_freed_memory()
    if not args.smoke:
        minutes = (runs * START_UP + settings * args.seconds * 1.3) / 60
        print(f"{settings} settings, about {minutes:.0f} minutes on two cores", file=sys.stderr)
    with tqdm(total=settings, desc="settings", file=sys.stderr) as bar:
        measured = [
            run(ranks, places, model, rates, args, bar) for ranks, places in args.layouts for model in args.models
        ]
    (report if args.nodes is None else report_nodes)(name, measured, latency_ms=args.latency)


if __name__ == "__main__":
    main()
