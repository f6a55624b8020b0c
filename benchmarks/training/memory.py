"""Peak memory of DGC beside the model and its gradients.

    python -m benchmarks.training.memory

Two processes train a stack of layers of 100M parameters with DDP, once with torch.optim.SGD without momentum and once
with DGC; the difference of their peak resident memory is what DGC and its optimizer hold: with dgc.SGD u and v, 8 bytes
a parameter, with dgc.AdamW m, s and v, 12 bytes, of which torch.optim.AdamW has 8. Without DDP, DDP's buckets are not
there, which hold each gradient a second time, 4 bytes a parameter. Four processes, as two nodes of two, do so with the
node as the worker, under DDP and FSDP2, where each rank has a half of it; under DDP also of the rows on their way
through the node, 4 bytes.
glibc keeps much of what is freed, and more of it under FSDP2 without DGC than with it. MALLOC_MMAP_THRESHOLD_=1000000
has it give back every tensor above a megabyte, so that the figures are those of tensors.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dgc
from benchmarks.harness import report

WIDTH, LAYERS = 500, 400  # small layers: their temporaries hardly show in the peak


def resident(field: str) -> int:
    """Returns a field of this process's memory status in bytes: VmRSS now, VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        density: None for torch.optim.SGD without momentum, and without DGC.
        warmup: steps from 25 % to the density.
        adamw: dgc.AdamW in place of dgc.SGD.
        wrapper: "DDP"; "none", the door without it; "DDP, 2 x 2" or "FSDP2, 2 x 2", four ranks as two nodes.
    """

    density: float | None = None
    warmup: int = 0
    adamw: bool = False
    wrapper: str = "DDP"

    @property
    def places(self) -> int:
        """Ranks of a node, which divide what DGC holds."""
        return 2 if self.wrapper.endswith("2 x 2") else 1

    @property
    def base(self) -> Case:
        """What this one's memory is beyond."""
        return Case(wrapper="DDP" if self.wrapper == "none" else self.wrapper)

    @property
    def held(self) -> float:
        """Bytes a parameter of u and v, or m, s and v, on one rank, and under DDP of rows on their way."""
        rows = 4 if self.wrapper == "DDP, 2 x 2" else 0
        return ((12 if self.adamw else 8) + rows) / self.places

    @property
    def name(self) -> str:
        """For the table."""
        optimizer = "dgc.AdamW" if self.adamw else "dgc.SGD"
        warmup = ", after a warm-up from 25 %" if self.warmup else ""
        where = {"DDP": "", "none": ", without DDP"}.get(self.wrapper, f", {self.wrapper} ranks")
        return f"{optimizer}, {100 * (self.density or 0):g} %{warmup}{where}"


CASES = (
    Case(0.001),
    Case(0.001, wrapper="none"),
    Case(0.01),
    Case(0.001, warmup=8),
    Case(0.001, adamw=True),
    Case(0.01, adamw=True),
    Case(0.001, wrapper="DDP, 2 x 2"),
    Case(0.001, wrapper="FSDP2, 2 x 2"),
    Case(0.001, adamw=True, wrapper="FSDP2, 2 x 2"),
)


def build(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Returns model and optimizer, with DGC where the case has it; a collective."""
    net: nn.Module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    mesh = None
    if case.places > 1:
        mesh = init_device_mesh("cpu", (2, case.places), mesh_dim_names=("replicate", "shard"))
    if mesh is not None and case.wrapper.startswith("FSDP2"):
        # Without DGC nobody exchanges between the nodes, which holds no memory either.
        for layer in [*net.children(), net]:
            fully_shard(layer, mesh=mesh["shard"])
    elif case.wrapper != "none":
        net = DistributedDataParallel(net)
    if case.density is None:
        return net, torch.optim.SGD(net.parameters(), lr=1e-3)
    kind = dgc.AdamW if case.adamw else partial(dgc.SGD, lr=1e-3, momentum=0.9)
    optimizer: torch.optim.Optimizer = kind(net.parameters())
    config = dgc.DGCConfig(density=case.density, warmup_steps=case.warmup)
    if case.wrapper == "none":
        dgc.attach(net, optimizer, config)
    else:
        dgc.DGCState(net.named_parameters(), optimizer, config, mesh=mesh).register(net)
    return net, optimizer


def worker(rank: int, world_size: int, folder: str, case: Case) -> None:
    """Trains a few steps and saves the peak of the last ones."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, store=dist.FileStore(f"{folder}/store", world_size)
    )
    model, optimizer = build(case)
    x = torch.randn(2, WIDTH)
    for step in range(case.warmup + 6):
        if step == case.warmup + 2:
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


def peak(case: Case) -> int:
    """Returns the largest peak of the ranks in bytes."""
    ranks = 2 * case.places
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (ranks, folder, case), nprocs=ranks)
        return int(torch.load(Path(folder) / "peak.pt"))


def main() -> None:
    """Measures and reports."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # of the processes that are started
    numel = WIDTH * WIDTH * LAYERS
    rows: list[list[str]] = []
    raw: dict[str, int] = {"numel": numel}
    bases: dict[Case, int] = {}
    for case in tqdm(CASES, unit="case"):
        if case.base not in bases:
            bases[case.base] = raw[f"{case.base.wrapper}, no DGC"] = peak(case.base)
        nbytes = raw[case.name] = peak(case) - bases[case.base]
        rows.append([case.name, f"{nbytes / numel:.2f}", f"{nbytes / numel / case.held:.3f}"])
    report(
        "memory_cpu",
        f"Peak resident memory of a rank beyond the same training with torch.optim.SGD without momentum and without "
        f"DGC, {numel:,} parameters, 2 processes, or 4 as 2 nodes of 2. u and v: 8 bytes; m, s and v: 12; rows on "
        "their way through the node: 4; a half of it where two ranks of a node divide it. glibc gives back what is "
        "freed (MALLOC_MMAP_THRESHOLD_=1000000).",
        ["optimizer, density", "bytes a parameter", "of these tensors"],
        rows,
        raw,
    )


if __name__ == "__main__":
    main()
