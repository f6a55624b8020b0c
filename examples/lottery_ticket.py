"""Looks for a lottery ticket: trains, prunes the smallest weights, goes back to an early step, and trains again.

    torchrun --standalone --nproc-per-node 2 examples/lottery_ticket.py --quick
    torchrun --standalone --nproc-per-node 2 examples/lottery_ticket.py --quick --dense

Iterative magnitude pruning with rewinding (Frankle et al., 2020): each round keeps half of the weights that are left in
the two large layers. Weights, optimizer, what DGC has accumulated, and its place in the warm-up go back together; what
waits of a pruned weight is forgotten.
"""

import copy

import torch
import torch.distributed as dist
from changing import Traffic, accuracy, batches, finish, options, start
from digits import RECIPE, convnet, split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dgc

KEPT = 0.5  # of the weights that are left, in each round
ROUNDS = 4  # after the first, which is not pruned: 6 % of the weights are left
BATCH_SIZE = 32  # on each rank


def pruned(weight: Tensor, alive: Tensor) -> Tensor:
    """Returns a mask of the largest of the weights alive."""
    kept = int(KEPT * alive.sum())
    chosen = weight.abs().masked_fill(~alive, -1).flatten().topk(kept).indices
    return torch.zeros_like(alive).flatten().index_fill(0, chosen, True).view_as(alive)


class Run:
    """A training whose state can be had as one object, and put back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parts = {"model": model, "optimizer": optimizer}
        if hasattr(optimizer, "dgc"):
            self.parts["dgc"] = optimizer.dgc  # the residual of this rank, momentum, and the step of the warm-up

    def save(self) -> dict[str, object]:
        """Returns a copy of all that training changes."""
        return {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}

    def rewind(self, saved: dict[str, object]) -> None:
        """Goes back to where save() was called."""
        for name, part in self.parts.items():
            part.load_state_dict(copy.deepcopy(saved[name]))


def main() -> None:
    """Trains on this rank."""
    args, device = start(options(__doc__), steps=800, quick=200)
    train, test_images, test_labels = split(device)
    images, labels = (tensor.to(device) for tensor in train.tensors)
    model = DistributedDataParallel(convnet().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **RECIPE)
    if not args.dense:
        dgc.attach(model, optimizer, dgc.DGCConfig(args.density, warmup_steps=args.steps // 5))
    run, traffic, saved, first = Run(model, optimizer), Traffic(), {}, args.steps // 10
    order = list(batches(len(images), BATCH_SIZE, args.steps, args.seed))
    large = [p for p in model.parameters() if p.ndim > 1 and p.numel() > 10_000]
    masks = {p: torch.ones_like(p, dtype=torch.bool) for p in large}
    for number in range(ROUNDS + 1):
        if number:
            masks = {p: pruned(p.data, alive) for p, alive in masks.items()}
            run.rewind(saved)
            for p, alive in masks.items():
                p.data.mul_(alive)
                if not args.dense:
                    optimizer.dgc.mask(p, alive)  # after loading: no checkpoint has masks
        for step in range(first if number else 0, args.steps):
            if step == first and not number:
                saved = run.save()
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * min(1, 10 * (step + 1) / args.steps) * (1 - step / args.steps)
            optimizer.zero_grad()
            cross_entropy(model(images[order[step]]), labels[order[step]]).backward()
            optimizer.step()
            with torch.no_grad():
                for p, alive in masks.items():
                    p.mul_(alive)
            traffic.count(optimizer)
        left = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
        result = accuracy(model.module, test_images, test_labels)
        if dist.get_rank() == 0:
            print(f"round {number}: {100 * left:.1f} % of the weights left, {result:.2f} %")
    finish("accuracy", result, traffic)


if __name__ == "__main__":
    main()
