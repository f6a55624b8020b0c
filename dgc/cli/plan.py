"""plan: measures the links and the step of a model, and says which way to exchange its gradients is the fastest."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from dgc.exchange.distributed import everyone_of

from . import report
from .checks import bytes_a_second, check_arguments, check_memory
from .cost import Cluster, Link, speeds_of
from .forecast import (
    HALF,
    WORTH,
    Forecast,
    best_dense,
    forecasts,
    local_steps,
    recommended,
    undecided,
)
from .links import half_of_backend, unsteady
from .measuring import Measured, Setting, measure, times
from .models import Model, load
from .paste import advice, ddp_lines, horovod_lines
from .ranks import UsageError, everywhere, join, machine_name, places_of, started
from .traffic import ddp_buckets

ONE_MACHINE = (
    "all ranks are on one machine, so the link that was measured is its memory, and the answer is for that alone. For "
    "machines apart, start plan on them, or describe their link: --link 1gbit --ranks 8 --step-ms 200"
)
"""What is said below the lines where no network was measured."""


def on_paper(args: argparse.Namespace, setting: Setting) -> list[Forecast]:
    """Returns the forecasts for a link that is only described."""
    step, backward = times(setting)
    network = Link(args.share * bytes_a_second(args.link), 1e-6 * args.latency_us)
    inside = Link(bytes_a_second(args.inside), 3.4e-6)  # NCCL's tuning table: ring, Simple, NVLink
    speeds = speeds_of(Cluster(args.ranks, args.ranks_per_node or 1, network, inside))
    buckets = ddp_buckets(setting.model.shapes)
    local = local_steps(buckets, args.ranks, step, backward, 1e9 * args.memory_gbytes)
    return forecasts(buckets, args.ranks, speeds, local, step)


def run(args: argparse.Namespace) -> int:
    """Plans, prints, and returns the exit status.

    Raises:
        UsageError: an option, the model, or what was found.
    """
    check_arguments(args)
    report.check_picture(args.picture)

    def setting_of(model: Model) -> Setting:
        step, backward = (None if ms is None else ms / 1e3 for ms in (args.step_ms, args.backward_ms))
        return Setting(model, args.optimizer, step, backward, args.seconds)

    if args.link is not None:
        setting = setting_of(load(args.model))
        found = on_paper(args, setting)
        places = args.ranks_per_node or 1
        where = f"{args.ranks} ranks, {places} a node, {args.link} a node; arithmetic, not measured"
        _show(args, setting.model, found, args.ranks, where, [], "fp16" if on_horovod() else "bf16")
        return 0
    process = started(os.environ)
    assert process is not None  # check_arguments
    device = join(process)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks < 2:
        raise UsageError("expected two ranks or more, got one, which has nobody to exchange with: start more")
    machines = everyone_of(None, machine_name())
    model = everywhere(lambda: _on(device, args.model))
    setting = setting_of(model)

    def check() -> bool:
        if model.loss is None:
            times(setting)
        check_memory(model, device, machines.count(machines[rank]))
        return True

    everywhere(check)
    digests = everyone_of(None, model.digest)
    if other := next((i for i, digest in enumerate(digests) if digest != digests[0]), None):
        raise UsageError(
            f"--model: expected the same model on all ranks, got {digests[0]} on rank 0 and {digests[other]} on rank "
            f"{other}: let it depend on neither rank nor data"
        )
    places = args.ranks_per_node or places_of(machines)
    if ranks % places:
        raise UsageError(f"--ranks-per-node: expected a divisor of {ranks} ranks, got {places}")

    def say(text: str) -> None:
        if rank == 0:
            print(f"plan: {text}", file=sys.stderr, flush=True)

    measured = measure(setting, device, places, say)
    if rank == 0:
        nodes = ranks // places if places > 1 else len(set(machines))
        where = (
            f"{ranks} ranks on {nodes} node{'s' * (nodes > 1)}, {dist.get_backend()}, measured in {measured.took:.0f} s"
        )
        half = "bf16" if half_of_backend() == torch.bfloat16 and not on_horovod() else "fp16"
        _show(args, model, measured.found, ranks, where, link_rows(measured), half)
        if line := unsteady(measured.links.probes):
            print(f"\nplan: {line}", file=sys.stderr if args.json else sys.stdout)
        if len(set(machines)) == 1:
            print(f"\nplan: {ONE_MACHINE}", file=sys.stderr if args.json else sys.stdout)
    dist.barrier()
    return 0


def _on(device: torch.device, text: str) -> Model:
    """Returns the model, whose function makes tensors on a device unless it says where."""
    with device:
        return load(text)


def link_rows(measured: Measured) -> list[list[str]]:
    """Returns a row for each collective that was measured."""
    rows = []
    for name, probe in measured.links.probes.items():
        few = min(probe.seconds)
        size, median, low, high = probe.spread
        at_least = 1e3 * sorted(probe.seconds[few])[len(probe.seconds[few]) // 2]
        spread = f"{1e3 * median:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"
        rows.append([name, f"{few:,}", f"{at_least:.2f}", f"{size:,}", spread])
    return rows


def on_horovod() -> bool:
    """Returns whether Horovod's launcher has started this process."""
    process = started(os.environ)
    return process is not None and process.launcher == "horovodrun"


def _lines(args: argparse.Namespace, chosen: Forecast, half: str, auto: Forecast | None) -> str:
    """Returns what to paste into a script of the launcher that has started this process."""
    if on_horovod():
        return horovod_lines(chosen, args.optimizer, args.steps, auto)
    return ddp_lines(chosen, args.steps, half, auto)


def _show(
    args: argparse.Namespace,
    model: Model,
    found: list[Forecast],
    ranks: int,
    where: str,
    links: list[list[str]],
    half: str,
) -> None:
    """Prints tables, the picture's name, and the lines to paste."""
    found = [replace(f, name=f.name.replace(HALF, half)) for f in found]
    chosen, dense = recommended(found), best_dense(found)
    auto = undecided(found, chosen)
    text, further = _lines(args, chosen, half, dense if auto else None), advice(chosen, auto)
    if args.picture:
        report.draw(args.picture, f"{model.name}, {model.parameters / 1e6:.1f}M parameters, {where}", found, chosen)
    if args.json:
        said = {**report.as_json(found, chosen), "links": links, "lines": text, "advice": further, "where": where}
        print(json.dumps(said, indent=1))
        return
    print(f"\n{model.name}: {len(model.shapes)} parameters, {model.parameters:,} elements; {where}\n")
    if links:
        print(report.table(["collective", "bytes", "ms", "bytes", "ms (lowest to highest)"], links), end="\n\n")
    print(
        report.table(report.headers(args.steps, args.price), report.forecast_rows(found, ranks, args.steps, args.price))
    )
    if args.picture:
        print(f"\npicture: {args.picture}")
    if auto:
        error = f"{100 * (WORTH - 1):.0f} %"
        both = f"{chosen.name} and {dense.name} are within {error} of each other"
        print(f"\n{both}, closer than a forecast can tell. Let the run decide:\n")
    elif chosen.density is None:
        print(f"\n{chosen.name} is as fast as DGC here, or faster, and loses nothing. Take:\n")
    else:
        print(f"\n{chosen.name}: {dense.seconds / chosen.seconds:.1f} times as fast as {dense.name}. Take:\n")
    print("\n".join(f"    {line}" if line else "" for line in text.split("\n")))
    if further:
        print(f"\n{further}")
