"""Trains a reversible language model, which recomputes its activations in the backward pass, to copy a sequence.

    torchrun --standalone --nproc-per-node 2 examples/reversible_lm.py --quick
    torchrun --standalone --nproc-per-node 2 examples/reversible_lm.py --quick --dense

A block takes x1, x2 to y1 = x1 + attention(x2), y2 = x2 + mlp(y1) (Gomez et al., 2017; Reformer, Kitaev et al., 2020),
so its inputs follow from its outputs, and none is stored. Each part makes a backward pass inside that of the model,
where DDP and DGC meet its gradients. The task is the Reformer's: 0 w 0 w, of which only the second w counts.
"""

import torch
import torch.distributed as dist
from changing import Traffic, accuracy, finish, options, start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import dgc

WORDS, LENGTH = 64, 31  # symbols besides 0, and length of w
WIDTH, HEADS, DEPTH = 128, 4, 3
BATCH_SIZE = 32  # on each rank


class Attention(nn.Module):
    """Causal attention behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what each of (batch, time, width) gathers from those before it."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def undo(part: nn.Module, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y - part(x), and dx with what comes to it through part; gradients of parameters go to .grad."""
    with torch.enable_grad():
        moved = part(x := x.detach().requires_grad_())
    moved.backward(dy)  # inside of the model's backward pass: the hooks of part's parameters run here
    return y - moved.detach(), dx + x.grad


class Block(nn.Module):
    """A reversible block of two streams."""

    def __init__(self) -> None:
        super().__init__()
        wide = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        self.f, self.g = Attention(), nn.Sequential(nn.LayerNorm(WIDTH), *wide)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)

    def reverse(self, y1: Tensor, y2: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the inputs of these outputs, and their gradients."""
        x2, d1 = undo(self.g, y1, y2, d1, d2)
        x1, d2 = undo(self.f, x2, y1, d2, d1)
        return x1, x2, d1, d2


class Reversible(torch.autograd.Function):
    """All blocks, of which only the last outputs are kept."""

    @staticmethod
    def forward(ctx, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        """Returns the mean of both streams, which both begin with x."""
        y = x, x
        for block in blocks:
            y = block(*y)
        ctx.blocks, ctx.outputs = blocks, y
        return (y[0] + y[1]) / 2

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of x."""
        streams = *ctx.outputs, d / 2, d / 2
        for block in reversed(ctx.blocks):
            streams = block.reverse(*streams)
        return streams[2] + streams[3], None


class LanguageModel(nn.Module):
    """Reversible blocks between an embedding and a linear layer: 620,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS + 1, WIDTH), nn.Embedding(2 * LENGTH + 2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS + 1))

    def forward(self, words: Tensor) -> Tensor:
        """Returns scores of the symbols of the second w, from (batch, 2 * LENGTH + 2) symbols."""
        x = self.words(words) + self.places.weight
        return self.head(Reversible.apply(x, self.blocks)[:, LENGTH + 1 : -1])


def main() -> None:
    """Trains on this rank."""
    args, device = start(options(__doc__), steps=600, quick=200)
    model = DistributedDataParallel(LanguageModel().to(device))
    optimizer, traffic = torch.optim.AdamW(model.parameters(), lr=1e-3), Traffic()
    if not args.dense:
        dgc.attach(model, optimizer, dgc.DGCConfig(args.density, warmup_steps=args.steps // 5))
    shape = args.steps + 1, dist.get_world_size(), BATCH_SIZE, LENGTH
    words = torch.randint(1, WORDS + 1, shape, generator=torch.Generator().manual_seed(args.seed))
    *train, test = nn.functional.pad(words[:, dist.get_rank()], (1, 0)).tile(2).to(device)
    for w in train:
        optimizer.zero_grad()
        cross_entropy(model(w).flatten(0, 1), w[:, LENGTH + 2 :].flatten()).backward()
        optimizer.step()
        traffic.count(optimizer)
    finish("accuracy", accuracy(model.module, test, test[:, LENGTH + 2 :]), traffic)


if __name__ == "__main__":
    main()
