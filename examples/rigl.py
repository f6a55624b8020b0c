"""Trains a CNN whose two large layers stay 90 % sparse, and chooses anew which weights are there as it goes.

    torchrun --standalone --nproc-per-node 2 examples/rigl.py --quick
    torchrun --standalone --nproc-per-node 2 examples/rigl.py --quick --dense

Every 50 steps the smallest weights die, and as many dead ones begin at zero: those of the largest gradient (RigL, Evci
et al., 2020), or any with --grow random (SET, Mocanu et al., 2018). --grow none keeps the first choice. What DGC has
accumulated of a dead weight is forgotten, and RigL's gradients, which it needs whole, come from a dense step.
"""

import math

import torch
from changing import Traffic, accuracy, batches, finish, options, start
from digits import RECIPE, convnet, split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dgc

ALIVE = 0.1  # share of the weights of a sparse layer
EVERY = 50  # steps between two changes
REPLACED = 0.3  # share of the weights alive that the first change replaces; it falls to 0 by a cosine
BATCH_SIZE = 32  # on each rank


def replace(weight: Tensor, alive: Tensor, score: Tensor, share: float) -> Tensor:
    """Returns a mask in which the smallest weights alive have given place to the dead ones of the largest score."""
    n = int(share * alive.sum())
    dying = weight.abs().masked_fill(~alive, math.inf).flatten().topk(n, largest=False).indices
    born = score.masked_fill(alive, -math.inf).flatten().topk(n).indices
    return alive.flatten().index_fill(0, dying, False).index_fill(0, born, True).view_as(alive)


class Masks:
    """Which weights of the large layers are alive, the same on all ranks."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.optimizer = optimizer
        self.generator = torch.Generator().manual_seed(seed)  # the same on all ranks
        self.alive: dict[nn.Parameter, Tensor] = {}
        for p in net.parameters():
            if p.ndim > 1 and p.numel() > 10_000:
                self.use(p, self.random(p).argsort(-1).argsort(-1) < ALIVE * p[0].numel())
                p.data.div_(ALIVE**0.5)  # fewer terms in each sum

    def random(self, p: Tensor) -> Tensor:
        """Returns numbers in [0, 1) of a weight's shape, rows flattened."""
        return torch.rand(len(p), p[0].numel(), generator=self.generator).to(p.device)

    def use(self, p: nn.Parameter, alive: Tensor) -> None:
        """Has other weights be alive from now on."""
        self.alive[p] = alive.view_as(p)
        if hasattr(self.optimizer, "dgc"):
            self.optimizer.dgc.mask(p, self.alive[p])
        elif (momentum := self.optimizer.state[p].get("momentum_buffer")) is not None:
            momentum.mul_(self.alive[p])
        p.data.mul_(self.alive[p])

    @torch.no_grad()
    def step(self) -> None:
        """Makes the optimizer's step, in which dead weights take no part."""
        for p, alive in self.alive.items():
            if not hasattr(self.optimizer, "dgc"):  # DGC does it in its own step
                p.grad.mul_(alive)
        self.optimizer.step()
        for p, alive in self.alive.items():
            p.mul_(alive)


def main() -> None:
    """Trains on this rank."""
    parser = options(__doc__)
    parser.add_argument("--grow", choices=("gradient", "random", "none"), default="gradient", help="which weights")
    args, device = start(parser, steps=1500, quick=500)
    train, test_images, test_labels = split(device)
    images, labels = (tensor.to(device) for tensor in train.tensors)
    model = DistributedDataParallel(convnet().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **RECIPE)
    if not args.dense:
        dgc.attach(model, optimizer, dgc.DGCConfig(args.density, warmup_steps=args.steps // 5))
    masks = Masks(model, optimizer, args.seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=args.steps)
    traffic, end = Traffic(), 3 * args.steps // 4
    for step, chosen in enumerate(batches(len(images), BATCH_SIZE, args.steps, args.seed), start=1):
        change = step % EVERY == 0 and step < end and args.grow != "none"
        if change and args.grow == "gradient" and not args.dense:
            optimizer.dgc.dense_step()
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        if change:  # .grad is whole between backward() and step(), on all ranks the same
            by_gradient = args.grow == "gradient"
            scores = {p: p.grad.abs() if by_gradient else masks.random(p).view_as(p) for p in masks.alive}
        masks.step()
        schedule.step()
        traffic.count(optimizer)
        if change:
            share = REPLACED / 2 * (1 + math.cos(math.pi * step / end))
            for p, alive in masks.alive.items():
                masks.use(p, replace(p.data, alive, scores[p], share))
    alive = sum(int((of | (p != 0)).sum()) for p, of in masks.alive.items()) / sum(p.numel() for p in masks.alive)
    finish(f"{100 * (1 - alive):.1f} % sparse, accuracy", accuracy(model.module, test_images, test_labels), traffic)


if __name__ == "__main__":
    main()
