"""Trains a CNN that grows: one block, then a second one over the frozen first, then all of it.

    torchrun --standalone --nproc-per-node 2 examples/progressive.py --quick
    torchrun --standalone --nproc-per-node 2 examples/progressive.py --quick --dense

DDP and optimizer are made anew where the parameters change, as DDP wants it, and the DGCState goes on with them:
rebind() takes over by name what waits, and gives back what has found no place. What waits of the frozen
block comes back when it thaws; what waits of the old head goes.
"""

import torch
from changing import Traffic, accuracy, batches, finish, options, start
from digits import RECIPE, split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dgc

BATCH_SIZE = 32  # on each rank


def block(inputs: int, outputs: int) -> nn.Module:
    """Returns a convolution that halves the image."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


class Growing(nn.Module):
    """A CNN that begins with one block and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(1, 32))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 14 * 14, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of ten digits."""
        return self.head(self.blocks(images))

    def grow(self) -> None:
        """Freezes the first block and adds a second one; a new head replaces the old one."""
        self.blocks.requires_grad_(False)
        self.blocks.append(block(32, 64))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, 10))

    def unfreeze(self) -> None:
        """Has all blocks train."""
        self.requires_grad_()


def main() -> None:
    """Trains on this rank."""
    args, device = start(options(__doc__), steps=1500, quick=600)
    train, test_images, test_labels = split(device)
    images, labels = (tensor.to(device) for tensor in train.tensors)
    net, traffic = Growing(), Traffic()
    stages = {"one block": (lambda: None, 0.02), "grown": (net.grow, 0.02), "unfrozen": (net.unfreeze, 0.01)}
    steps = args.steps // len(stages)
    state, left = None, {}
    for number, (name, (change, lr)) in enumerate(stages.items()):
        change()
        model = DistributedDataParallel(net.to(device))
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = (torch.optim.SGD if args.dense else dgc.SGD)(trained, lr=lr, **RECIPE)
        if state is not None:
            frozen = {name: kept for name, kept in left.items() if name.startswith("blocks")}  # the old head is gone
            left = state.rebind(model, optimizer, back=frozen)
        elif not args.dense:
            config = dgc.DGCConfig(args.density, warmup_steps=steps // 5)
            state = dgc.DGCState(model.named_parameters(), optimizer, config)
            state.register(model)
        optimizer.dgc = state
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for chosen in batches(len(images), BATCH_SIZE, steps, args.seed + 1000 * number):
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            traffic.count(optimizer)
        if torch.distributed.get_rank() == 0:
            behind = f"; left behind: {', '.join(left)}" if left else ""
            print(f"{name}: {accuracy(net, test_images, test_labels):.2f} %{behind}")
        del model, optimizer, schedule  # the hooks of the old DDP module have to be gone before a new one comes
    finish("accuracy", accuracy(net, test_images, test_labels), traffic)


if __name__ == "__main__":
    main()
