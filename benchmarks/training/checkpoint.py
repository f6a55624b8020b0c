"""Checkpoints of momentum and residual: bytes, seconds for which the run stands still, and seconds to load.

    python -m benchmarks.training.checkpoint

Two ranks save 100M parameters, and load them; then three ranks and one load the same directory. No step is timed: a
save in the background is said by what it blocks, and by the time until its directory has its name while the ranks do
nothing else. Files go to the folder that TMPDIR names, and are flushed (fsync), so the disk decides much of it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import dgc
from benchmarks.harness import report

WIDTH = 5000


def clocked(call: Callable[[], object]) -> float:
    """Returns the seconds of a call, of the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    seconds = torch.tensor([time.perf_counter() - begin])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def made(layers: int) -> dgc.DGCState:
    """Returns a state whose momentum and residual are normal numbers, other ones on each rank."""
    with torch.device("cpu"):
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])
    optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = dgc.DGCState(model.named_parameters(), optimizer, process_group=dist.group.WORLD)
    torch.manual_seed(dist.get_rank())
    state.memory.residual.normal_()
    if state.memory.momentum is not None:
        state.memory.momentum.normal_()
    return state


def worker(rank: int, world_size: int, folder: str, layers: int, rounds: int, saves: bool) -> None:
    """Saves and loads, or loads what others have saved; rank 0 keeps the seconds."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{world_size}", world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    state = made(layers)
    seconds: dict[str, list[float]] = {}
    name = Path(folder) / "float32"

    def note(what: str, call: Callable[[], object]) -> None:
        seconds.setdefault(what, []).append(clocked(call))

    for _ in range(rounds):
        if saves:
            note("save", lambda: dgc.checkpoint.save(state, name))
            note("bfloat16", lambda: dgc.checkpoint.save(state, f"{folder}/bfloat16", residual_dtype=torch.bfloat16))
            kept: list[dgc.checkpoint.Saving] = []
            note("blocked", lambda k=kept: k.append(dgc.checkpoint.save(state, name, background=True)))  # type: ignore[misc]
            note("until it is there", kept[0].wait)
            note("load of bfloat16", lambda: dgc.checkpoint.load(state, f"{folder}/bfloat16"))
        note("load", lambda: dgc.checkpoint.load(state, name))
    if rank == 0:
        torch.save(seconds, f"{folder}/seconds{world_size}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help=f"of {WIDTH * WIDTH:,} parameters each")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is done")
    args = parser.parse_args()
    raw: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world_size, saves in ((2, True), (3, False), (1, False)):
            mp.spawn(worker, (world_size, folder, args.layers, args.rounds, saves), nprocs=world_size)
            raw[str(world_size)] = torch.load(f"{folder}/seconds{world_size}.pt")
        nbytes = {
            kind: sum(f.stat().st_size for f in (Path(folder) / kind).iterdir()) for kind in ("float32", "bfloat16")
        }
    numel = args.layers * WIDTH * WIDTH
    two = raw["2"]
    rows = []
    for label, times, size in (
        ("save", two["save"], "float32"),
        ("save, residual_dtype=torch.bfloat16", two["bfloat16"], "bfloat16"),
        ("save, background=True: the run waits", two["blocked"], "float32"),
        ("save, background=True: from then until it is there", two["until it is there"], "float32"),
        ("load on 2 ranks", two["load"], "float32"),
        ("load on 2 ranks, residual in bfloat16", two["load of bfloat16"], "bfloat16"),
        ("load on 3 ranks", raw["3"]["load"], "float32"),
        ("load on 1 rank", raw["1"]["load"], "float32"),
    ):
        spread = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        rows.append([label, spread, f"{nbytes[size] / 2**20:,.0f}", f"{nbytes[size] / 2 / numel:.2f}"])
    report(
        "checkpoint",
        f"Checkpoints of dgc.SGD's momentum and residual, {numel:,} parameters, saved by 2 ranks into one directory; "
        f"seconds of the slowest rank, median of {args.rounds} (lowest to highest).",
        ["what", "seconds", "MiB of both ranks", "bytes a parameter and rank"],
        rows,
        {"numel": numel, "bytes": nbytes, "seconds by ranks": raw},
    )


if __name__ == "__main__":
    main()
