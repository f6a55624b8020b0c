"""Trains for some steps with the dgc that is installed, and checks what can go wrong with a package.

    torchrun --standalone --nproc-per-node 2 launch/smoke.py --backend native

It is installed and not the checkout's, its kernels are the ones expected, all ranks end with the same bits though their
data differ, the loss falls, and few bytes are sent.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc

STEPS = 100


def main() -> None:
    """Trains on this rank.

    Raises:
        SystemExit: something is not as it has to be.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("native", "reference"), default="native", help="default: %(default)s")
    backend = parser.parse_args().backend

    folder = Path(dgc.__file__).parent
    check(Path(sys.prefix) in folder.parents, f"dgc: expected it in {sys.prefix}, got {folder}")
    check(dgc.backend("cpu") == backend, f"backend: expected {backend}, got {dgc.backend('cpu')}")

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(2048, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    )
    config = dgc.DGCConfig(density=0.01)
    optimizer = dgc.attach(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), config)
    torch.manual_seed(dist.get_rank())
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    parameters = torch.cat([p.detach().flatten() for p in model.parameters()]).view(torch.uint8)
    everyone = [torch.empty_like(parameters) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, parameters)
    stats = optimizer.dgc.stats  # type: ignore[attr-defined]
    first, last = (sum(some) / len(some) for some in (losses[:10], losses[-10:]))
    check(all(torch.equal(parameters, other) for other in everyone), "parameters: expected the same bits on all ranks")
    check(stats.steps == STEPS, f"steps: expected {STEPS} reduced by DGC, got {stats.steps}")
    check(last < 0.6 * first, f"loss: expected it below 0.6 of {first:.2f}, got {last:.2f}")
    # 1 % of 294,912 weights, 6 bytes each, and 6,154 others dense; the gradient has 1.2 MB.
    check(0 < 20 * stats.bytes_sent < stats.bytes_dense, f"bytes: expected 1/20 of {stats.bytes_dense}, got {stats}")
    if dist.get_rank() == 0:
        cuda = "with" if dgc.backend("cuda") == "native" else "without"
        print(
            f"torch-dgc {dgc.__version__}: Python {platform.python_version()}, torch {torch.__version__}, {backend} "
            f"kernels, {cuda} CUDA's; {dist.get_world_size()} ranks, the same bits after {STEPS} steps, loss "
            f"{first:.2f} -> {last:.2f}, {stats.bytes_sent:,} bytes a step where {stats.bytes_dense:,} were dense"
        )
    dist.destroy_process_group()


def check(holds: bool, message: str) -> None:
    """Ends the script with a message unless something holds."""
    if not holds:
        raise SystemExit(f"smoke.py: {message}")


if __name__ == "__main__":
    main()
