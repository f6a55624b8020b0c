"""Trains the CNN of mnist.py with DGC, goes back to the last checkpoint after a loss spike, and leaves out its batch.

    torchrun --standalone --nproc-per-node 2 examples/rollback_mnist.py
    torchrun --standalone --nproc-per-node 2 examples/rollback_mnist.py --leave-out 70

One batch is planted that wrecks the model: its pixels are a hundred times as bright, on one rank. The mean loss of all
ranks shows it, so all of them go back together: weights, optimizer and what DGC has not sent yet. The steps since the
checkpoint are done again without that batch, and the run ends with the bits of the second line, which never saw it.
"""

import shutil
import statistics
import tempfile
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from digits import RECIPE, convnet, dgc_config, options, split, start_ddp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dgc


def main() -> None:
    """Trains on this rank."""
    parser = options(dense=False)
    parser.add_argument(
        "--folder", type=Path, help="for checkpoints, on a disk that all ranks share; None: a temporary one"
    )
    parser.add_argument("--every", type=int, default=25, help="steps between two checkpoints")
    parser.add_argument("--bad", type=int, default=70, help="number of the planted batch")
    parser.add_argument("--leave-out", type=int, help="number of a batch to leave out from the start")
    args, device = start_ddp(parser)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    train, test_images, test_labels = split(device)
    folders = [str(args.folder or tempfile.mkdtemp())]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(convnet().to(device))
    optimizer = dgc.SGD(model.parameters(), lr=args.lr, **RECIPE)
    batches = args.epochs * len(train) // (args.batch_size * ranks)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc_config(args, batches))
    state.register(model)

    def save(number: int) -> None:
        """Writes what is needed to go on before batch `number`; DGC's part while the run goes on."""
        if rank == 0:
            (folder / str(number)).mkdir(parents=True)
            both = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(both, folder / str(number) / "rest.pt")
        dist.barrier()
        dgc.checkpoint.save(state, folder / str(number) / "dgc", background=True)

    def load(number: int) -> None:
        both = torch.load(folder / str(number) / "rest.pt", weights_only=True)
        model.module.load_state_dict(both["model"])
        optimizer.load_state_dict(both["optimizer"])
        dgc.checkpoint.load(state, folder / str(number) / "dgc")

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns this rank's part of a batch, which depends on its number alone, so that it can be had again."""
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + number)
        chosen = torch.randint(len(train), (ranks * args.batch_size,), generator=generator)[rank::ranks]
        x, y = train[chosen]
        return (100 * x if number == args.bad and rank == 0 else x), y

    left_out = {args.leave_out}
    losses: list[float] = []
    number, saved = 0, -1
    while number < batches:
        if number % args.every == 0 and number != saved:
            save(number)
            saved = number
        if number in left_out:
            number += 1
            continue
        x, y = batch(number)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)  # so that all ranks decide alike
        losses = [*losses[-20:], mean.item()]
        if len(losses) > 10 and losses[-1] > 5 * statistics.median(losses) + 5:
            if rank == 0:
                print(f"loss {losses[-1]:.1f} at batch {number}: back to batch {saved}, and on without it")
            left_out.add(number)
            dgc.checkpoint.save(state, folder / "wrecked")  # waits for the one in the background
            load(saved)
            number, losses = saved, losses[:-1]
            continue
        number += 1

    if rank == 0:
        with torch.no_grad():
            right = (model.module(test_images).argmax(1) == test_labels).double().mean().item()
        weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
        print(f"test accuracy {100 * right:.1f} %, weights {zlib.crc32(weights):08x}")
    dgc.checkpoint.save(state, folder / "last")
    dist.barrier()
    if rank == 0 and args.folder is None:
        shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
