"""Trains an LSTM whose recurrent weights are blocks of 32 x 32 on a Barabasi-Albert layout, 91 % sparse.

    torchrun --standalone --nproc-per-node 2 examples/block_sparse.py --quick
    torchrun --standalone --nproc-per-node 2 examples/block_sparse.py --quick --dense

The layout is that of OpenAI's block-sparse LSTMs (Gray et al., 2017): a few units are joined to many, most to a few.
The blocks that are there are one compact parameter, so DGC accumulates, selects and sends nothing of the others. The
network reads a digit of MNIST row by row.
"""

import networkx
import torch
from changing import Traffic, accuracy, batches, finish, options, start
from digits import split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dgc

SIDE = 32  # of a block
BATCH_SIZE = 32  # on each rank


def layout(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns rows and columns of the blocks of a matrix of n x n: a Barabasi-Albert tree and the diagonal."""
    edges = torch.tensor(list(networkx.barabasi_albert_graph(n, 1, seed=seed).edges)).t()
    diagonal = torch.arange(n)
    return torch.cat([edges[0], edges[1], diagonal]), torch.cat([edges[1], edges[0], diagonal])


class BlockSparse(nn.Module):
    """A linear map of which only some blocks are there, without a bias."""

    def __init__(self, rows: Tensor, columns: Tensor, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        fan_in = SIDE * len(rows) / outputs
        self.blocks = nn.Parameter(torch.randn(len(rows), SIDE, SIDE) / fan_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, outputs * SIDE) from (batch, inputs * SIDE)."""
        taken = x.unflatten(1, (-1, SIDE))[:, self.columns].transpose(0, 1)
        parts = torch.bmm(taken, self.blocks).transpose(0, 1)
        return x.new_zeros(len(x), self.outputs, SIDE).index_add(1, self.rows, parts).flatten(1)


class SparseLSTM(nn.Module):
    """An LSTM over the rows of an image and a linear layer: 517,000 parameters, of 4,331,000 without the layout."""

    def __init__(self, seed: int, n: int = 32) -> None:
        super().__init__()
        layouts = [layout(n, seed + gate) for gate in range(4)]
        rows = torch.cat([gate * n + rows for gate, (rows, _) in enumerate(layouts)])
        self.recurrent = BlockSparse(rows, torch.cat([columns for _, columns in layouts]), 4 * n)
        self.inputs, self.head = nn.Linear(28, 4 * n * SIDE), nn.Linear(n * SIDE, 10)
        nn.init.ones_(self.inputs.bias[n * SIDE : 2 * n * SIDE])  # the forget gate begins open

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of ten digits, of images (batch, 1, 28, 28)."""
        h = c = images.new_zeros(len(images), self.head.in_features)
        for row in self.inputs(images.squeeze(1)).unbind(1):
            i, f, o, g = (row + self.recurrent(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def main() -> None:
    """Trains on this rank."""
    args, device = start(options(__doc__), steps=1500, quick=400)
    train, test_images, test_labels = split(device)
    images, labels = (tensor.to(device) for tensor in train.tensors)
    model = DistributedDataParallel(SparseLSTM(args.seed).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if not args.dense:
        dgc.attach(model, optimizer, dgc.DGCConfig(args.density, warmup_steps=args.steps // 5, clip_norm=1.0))
    traffic = Traffic()
    for chosen in batches(len(images), BATCH_SIZE, args.steps, args.seed):
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        if args.dense:  # DGC clips before it accumulates: DGCConfig.clip_norm
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        traffic.count(optimizer)
    finish("accuracy", accuracy(model.module, test_images, test_labels), traffic)


if __name__ == "__main__":
    main()
