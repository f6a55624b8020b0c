"""Trains a GPT on the King James Bible on islands that exchange every 15 steps, sparsely, or at every step by DDP.

    torchrun --standalone --nproc-per-node 2 examples/local_steps_gpt.py
    torchrun --standalone --nproc-per-node 2 examples/local_steps_gpt.py --diloco
    torchrun --standalone --nproc-per-node 2 examples/local_steps_gpt.py --dense

Each rank is an island; with --nodes 2 the ranks of two islands average inside by DDP. Where there is no environment
yet, launch/local_steps.sh makes one and starts the first line. The network and the text are those of gpt.py.
"""

import argparse
import logging
import math
import os
from functools import partial
from hashlib import sha256

import torch
import torch.distributed as dist
from gpt import GPT, groups, perplexity, samples, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--every", type=int, default=15, help="steps between two rounds")
    parser.add_argument("--density", type=float, default=0.03, help="share of the way that is sent in a round")
    parser.add_argument("--residual-decay", type=float, default=0.95, help="of what waits, in each round")
    parser.add_argument("--diloco", action="store_true", help="DiLoCo: all of it, and Nesterov momentum on the mean")
    parser.add_argument("--dense", action="store_true", help="ordinary DDP over all ranks, without local steps")
    parser.add_argument("--nodes", type=int, help="islands, of as many ranks each; None: each rank is one")
    parser.add_argument("--steps", type=int, default=600, help="length of the run")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of 128 words on each rank")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, reached after a tenth of the run")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices")
    parser.add_argument("--clip", type=float, default=1.0, help="norm that a rank's gradient is clipped to")
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the model")
    parser.add_argument("--heads", type=int, default=4, help="of attention")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of samples")
    return parser


def local_steps(
    args: argparse.Namespace, net: GPT, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, dgc.LocalSteps]:
    """Returns the model of this island and its rounds."""
    config = dgc.DGCConfig(args.density, residual_decay=args.residual_decay, wire_dtype="8bit")
    outer = partial(dgc.SGD, lr=1.0)
    if args.diloco:
        config, outer = dgc.DGCConfig(density=1.0), partial(dgc.OuterSGD, lr=0.7, momentum=0.9)
    if args.nodes is None:
        return net, dgc.LocalSteps(net, optimizer, config, every=args.every, outer=outer)
    shape = args.nodes, dist.get_world_size() // args.nodes
    mesh = init_device_mesh(next(net.parameters()).device.type, shape, mesh_dim_names=("islands", "inside"))
    model = DistributedDataParallel(net, process_group=mesh["inside"].get_group())
    return model, dgc.LocalSteps(model, optimizer, config, every=args.every, outer=outer, mesh=mesh)


def digest(model: nn.Module) -> str:
    """Returns a hash of the weights."""
    found = sha256()
    for p in model.parameters():
        found.update(p.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Trains on this rank."""
    parser = arguments()
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/local_steps_gpt.py")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.nodes is not None and (args.nodes < 1 or world_size % args.nodes):
        parser.error(f"--nodes: expected a divisor of the {world_size} ranks, got {args.nodes}")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    text = tokens()
    words, following = samples(text[: -len(text) // 20])
    valid = text[-len(text) // 20 :]

    torch.manual_seed(args.seed)  # the same weights on all ranks
    net = GPT(args.width, args.depth, args.heads).to(device)
    optimizer = torch.optim.AdamW(groups(net, args.weight_decay), lr=args.lr)
    if args.dense:
        model, local = DistributedDataParallel(net), None
    else:
        model, local = local_steps(args, net, optimizer)
    rise = max(1, args.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )

    torch.manual_seed(args.seed + rank)  # dropout differs between ranks
    order = torch.Generator().manual_seed(args.seed)  # the same on all ranks, which take turns
    bar = tqdm(total=args.steps, desc="dense" if args.dense else "local steps", unit="step", disable=rank != 0)
    with logging_redirect_tqdm(), bar:
        for _ in range(args.steps):
            chosen = torch.randint(len(words), (world_size, args.batch_size), generator=order)[rank]
            optimizer.zero_grad()
            scores = model(words[chosen].to(device))
            loss = cross_entropy(scores.flatten(0, 1), following[chosen].flatten().to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            scheduler.step()
            bar.update()
            bar.set_postfix_str(f"train perplexity {math.exp(loss.item()):.0f}")
    if local is not None:
        local.finish()  # exchanges the steps since the last round
    digests: list[str | None] = [None] * world_size
    dist.all_gather_object(digests, digest(net))
    if rank == 0:
        print(f"validation perplexity {perplexity(net, valid, device):.1f}")
        print(f"{world_size} ranks, weights equal on all: {len(set(digests)) == 1}")
    if rank == 0 and local is not None:
        stats = local.state.stats
        sent, dense = stats.total_bytes_sent / args.steps, stats.bytes_dense
        print(f"{local.rounds} rounds; bytes a step to other islands: {sent:,.0f}")
        print(f"of DDP: {dense:,}, {dense / sent:,.0f} times as many")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
