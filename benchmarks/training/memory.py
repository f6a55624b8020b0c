"""Peak memory of DGC beside the model and its gradients.

    python -m benchmarks.training.memory

Two processes train a stack of layers of 100M parameters with DDP, once with torch.optim.SGD without momentum and once
with DGC; the difference of their peak resident memory is what DGC and its optimizer hold: with dgc.SGD u and v, 8 bytes
a parameter, with dgc.AdamW m, s and v, 12 bytes, of which torch.optim.AdamW has 8. Without DDP, DDP's buckets are not
there, which hold each gradient a second time, 4 bytes a parameter.
What is left over after a warm-up is glibc's: it keeps freed scratch of gloo's all-gather in the arenas of gloo's two
threads, at most 64 MB in each whatever the model's size. MALLOC_MMAP_THRESHOLD_=1000000 in the environment avoids it.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from benchmarks.harness import report

WIDTH, LAYERS = 500, 400  # small layers: their temporaries hardly show in the peak


def resident(field: str) -> int:
    """Returns a field of this process's memory status in bytes: VmRSS now, VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def worker(
    rank: int, world_size: int, folder: str, density: float | None, warmup: int, adamw: bool, door: bool
) -> None:
    """Trains a few steps and saves the peak of the last ones."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, store=dist.FileStore(f"{folder}/store", world_size)
    )
    model: nn.Module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    if not door:
        model = DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9 if door else 0.0)
    if door:
        dgc.attach(model, optimizer, dgc.DGCConfig(density=density or 1.0, warmup_steps=warmup))
    elif density is not None:
        p = model.parameters()
        optimizer = dgc.AdamW(p) if adamw else dgc.SGD(p, lr=1e-3, momentum=0.9)
        config = dgc.DGCConfig(density=density, warmup_steps=warmup)
        state = dgc.DGCState(model.named_parameters(), optimizer, config)
        state.register(model)
    x = torch.randn(2, WIDTH)
    for step in range(warmup + 6):
        if step == warmup + 2:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    peaks = torch.tensor([resident("VmHWM")])
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save(peaks, f"{folder}/peak.pt")
    dist.destroy_process_group()


def peak(density: float | None, warmup: int = 0, adamw: bool = False, door: bool = False) -> int:
    """Returns the larger peak of two ranks in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (2, folder, density, warmup, adamw, door), nprocs=2)
        return int(torch.load(Path(folder) / "peak.pt"))


def main() -> None:
    """Measures and reports."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    numel = WIDTH * WIDTH * LAYERS
    base = peak(None)
    rows, raw = [], {"numel": numel, "dense bytes": base}
    for label, density, warmup, adamw, door in (
        ("dgc.SGD, 0.1 %", 0.001, 0, False, False),
        ("dgc.SGD, 0.1 %, without DDP", 0.001, 0, False, True),
        ("dgc.SGD, 1 %", 0.01, 0, False, False),
        ("dgc.SGD, 0.1 %, after a warm-up from 25 %", 0.001, 8, False, False),
        ("dgc.AdamW, 0.1 %", 0.001, 0, True, False),
        ("dgc.AdamW, 1 %", 0.01, 0, True, False),
    ):
        nbytes = peak(density, warmup, adamw, door) - base
        raw[label] = nbytes
        rows.append([label, f"{nbytes / numel:.2f}", f"{nbytes / numel / (12 if adamw else 8):.3f}"])
    report(
        "memory_cpu",
        f"Peak resident memory beyond DDP without momentum, {numel:,} parameters, 2 processes. u and v: "
        "8 bytes; m, s and v: 12.",
        ["optimizer, density", "bytes a parameter", "of these tensors"],
        rows,
        raw,
    )


if __name__ == "__main__":
    main()
