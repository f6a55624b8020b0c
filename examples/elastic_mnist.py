"""The training of mnist.py, which goes on when a worker dies.

    launch/torchrun.sh --nnodes 1:1 --nproc-per-node 3 --max-restarts 3 examples/elastic_mnist.py

Kill a worker (kill -9): torchrun ends the others and starts all of them again, and they go on from the newest
checkpoint. Started by hand it goes on too, with another number of workers if you like (--nproc-per-node 2), as long as
the options are the same; rm -r runs/elastic_mnist begins anew.

A checkpoint is a directory step<N>. Rank 0 writes rest.pt, what all ranks have alike; then all ranks write dgc/, their
momentum and residual. It is there only when all of it is, so a step without it does not count. The last two are kept.

On two workers, a run that was killed ends with the bits of one that was not. On more, DDP's first step after a start
has other buckets, in which gradients add up in another order.
"""

import math
import shutil
from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from logging import getLogger
from pathlib import Path

import torch
import torch.distributed as dist
from digits import RECIPE, Run, convnet, dgc_config, options, split, start_ddp, train_step
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc

logger = getLogger(__name__)

SAME = ("density", "warmup_steps", "epochs", "batch_size", "lr", "seed")
"""Options that a run has to the end."""


def main() -> None:
    """Reads the options and trains on this rank."""
    parser = options(dense=False)
    parser.add_argument("--folder", type=Path, default=Path("runs/elastic_mnist"), help="of the checkpoints")
    parser.add_argument("--save-every", type=int, default=50, help="steps from one checkpoint to the next")
    train(*start_ddp(parser))
    # The model is gone by now, and has to be: if DDP is the last to hold the group, it ends it without giving up
    # Python's lock, for which gloo's threads may be waiting to end the last exchange (pytorch/pytorch#56297).
    dist.destroy_process_group()


def train(args: Namespace, device: torch.device) -> None:
    """Trains on this rank, from the newest checkpoint on."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    images, test_images, test_labels = split(device)
    sampler = Sampler(images, seed=args.seed, drop_last=True)
    loader = DataLoader(images, args.batch_size, sampler=sampler, drop_last=True)
    epoch_steps = len(loader)
    steps = args.epochs * epoch_steps

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(convnet().to(device))
    optimizer = dgc.SGD(model.parameters(), lr=args.lr, **RECIPE)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc_config(args, steps))
    state.register(model)

    run = Run(args, steps, rank)
    checkpoint = newest(args.folder)
    left = steps
    if checkpoint is not None:
        # Nothing here draws random numbers after the start; dropout would need torch.get_rng_state() of each rank.
        saved = torch.load(checkpoint / "rest.pt", map_location=device, weights_only=True)
        check_options(args, saved["options"])
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sampler.load_state_dict(saved["sampler"])
        dgc.checkpoint.load(state, checkpoint / "dgc")
        left = (args.epochs - sampler.epoch - 1) * epoch_steps + len(loader) if sampler.epoch < args.epochs else 0
        run.load_state_dict(saved["run"], left)
        logger.info("resumed from %s: epoch %d, image %d; %s", checkpoint, sampler.epoch, sampler.done, waiting(state))
    # It goes by the number of steps alone, and with another number of workers that is another one.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, last_epoch=steps - left - 1)

    def save() -> None:
        """Saves a checkpoint, and removes all but the last two."""
        directory = args.folder / f"step{state.step:06d}"
        if rank == 0:
            # It may be there: a worker died here before, or another rank is in dgc.checkpoint.save() already.
            directory.mkdir(parents=True, exist_ok=True)
            rest = {
                "options": {name: vars(args)[name] for name in SAME},
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "sampler": sampler.state_dict(),
                "run": run.state_dict(state.stats),
            }
            torch.save(rest, directory / "rest.pt")
        dgc.checkpoint.save(state, directory / "dgc")
        logger.info("saved %s: %s", directory, waiting(state))
        if rank == 0:
            for old in set(args.folder.glob("step*")).difference(complete(args.folder)[-2:]):
                shutil.rmtree(old)

    resumed = state.step
    loss = math.nan
    with logging_redirect_tqdm(), run.bar:
        while sampler.epoch < args.epochs:
            for x, y in run.clocked(loader):
                # In front of a step, so that the record of the one before is complete.
                if state.step % args.save_every == 0 and state.step > resumed:
                    save()
                loss = train_step(model, optimizer, scheduler, x.to(device), y.to(device))
                sampler.done += args.batch_size * world_size
            run.test(model.module, test_images, test_labels, loss)
            sampler.set_epoch(sampler.epoch + 1)
        if left:
            save()

    if rank == 0 and args.log_file:
        run.write("DDP", model, world_size, state.stats)


class Sampler(DistributedSampler):
    """That begins in the middle of an epoch, on any number of ranks.

    Ranks take the images of an epoch in turns, so how many are done says which are left. Up to one for each rank is
    left out where the number of ranks does not divide it.
    """

    done = 0
    """Images of this epoch that have been trained on, by all ranks together."""

    def __iter__(self) -> Iterator[int]:
        """Returns the images that are left for this rank."""
        return islice(super().__iter__(), self._begin(), None)

    def __len__(self) -> int:
        """Returns how many there are."""
        return max(0, super().__len__() - self._begin())

    def _begin(self) -> int:
        return -(-self.done // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch."""
        super().set_epoch(epoch)
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the position."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Takes up the position."""
        self.set_epoch(saved["epoch"])
        self.done = saved["done"]


def complete(folder: Path) -> list[Path]:
    """Returns the checkpoints that count, the newest last."""
    return sorted(path.parent for path in folder.glob("step*/dgc"))


def newest(folder: Path) -> Path | None:
    """Returns the checkpoint to resume from, the same on all ranks: rank 0 chooses."""
    choice = [next(reversed(complete(folder)), None) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(choice)
    return choice[0]


def check_options(args: Namespace, saved: dict[str, object]) -> None:
    """Raises ValueError where options are not those of the checkpoint."""
    differ = [f"{name} {saved[name]}, got {vars(args)[name]}" for name in SAME if saved[name] != vars(args)[name]]
    if differ:
        raise ValueError(
            f"{args.folder}: a run with other options: expected {'; '.join(differ)}. Choose another --folder"
        )


def waiting(state: dgc.DGCState) -> str:
    """Returns how much waits in this rank's residual, in words."""
    return f"residual {state.residual_norm:.6g}"


if __name__ == "__main__":
    main()
