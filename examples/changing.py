"""What gan.py, progressive.py, reversible_lm.py, block_sparse.py, rigl.py and lottery_ticket.py share.

Options, the processes' start, the batches of a rank, accuracy, and the line that each run ends with.
"""

import argparse
import logging
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def options(description: str, density: float = 0.01) -> argparse.ArgumentParser:
    """Returns the parser of the options that all six have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="send whole gradients, without DGC")
    parser.add_argument("--density", type=float, default=density, help="share that is sent (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the data (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a shorter run, of a few minutes on two cores")
    parser.add_argument("--steps", type=int, help="length of the run, in place of what --quick or the default say")
    return parser


def start(parser: argparse.ArgumentParser, steps: int, quick: int) -> tuple[argparse.Namespace, torch.device]:
    """Reads the options and joins the other processes; returns the options, steps filled in, and this rank's device."""
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/{parser.prog}")
    args.steps = args.steps or (quick if args.quick else steps)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    logging.basicConfig(level=logging.INFO if dist.get_rank() == 0 else logging.WARNING, format="%(message)s")
    torch.manual_seed(args.seed)  # the same weights on all ranks
    return args, device


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yields for each step which `size` of `count` samples this rank takes; all ranks draw from one generator."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (dist.get_world_size(), size), generator=generator)[dist.get_rank()]


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Returns the percentage of the labels that have the highest score."""
    return 100 * (model(inputs).argmax(-1) == labels).double().mean().item()


class Traffic:
    """Bytes that one rank has sent in gradients: as DGC counts them, and of a dense step those of a ring."""

    def __init__(self) -> None:
        self.total = 0

    def count(self, optimizer: torch.optim.Optimizer, passes: int = 1) -> None:
        """Adds the step that the optimizer has just made; of a dense one, as many backward passes as DDP exchanges."""
        if getattr(optimizer, "dgc", None) is not None:
            self.total += optimizer.dgc.stats.bytes_sent
            return
        ranks = dist.get_world_size()
        gradients = sum(p.grad.nbytes for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
        self.total += passes * 2 * (ranks - 1) * gradients // ranks


def finish(what: str, percent: float, traffic: Traffic) -> None:
    """Has rank 0 print the result, and leaves the other processes."""
    if dist.get_rank() == 0:
        print(f"{what} {percent:.2f} %, {traffic.total:,} bytes sent", flush=True)
    dist.destroy_process_group()
