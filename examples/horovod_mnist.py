"""Trains a CNN on 5,000 MNIST digits with Horovod, with DGC or without: the training of mnist.py, line for line.

    horovodrun -np 2 python examples/horovod_mnist.py
    horovodrun -np 2 python examples/horovod_mnist.py --dense

launch/install_horovod.sh installs Horovod, launch/horovodrun.sh starts it.
"""

import logging
import os

import horovod.torch as hvd
import torch
from digits import Run, convnet, digits, options
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc
import dgc.horovod as dgc_hvd


def main() -> None:
    """Trains on this rank."""
    args = options().parse_args()
    hvd.init()
    rank, world_size = hvd.rank(), hvd.size()
    cuda = torch.cuda.device_count() >= hvd.local_size()  # one GPU for each process of this machine, or none
    device = torch.device("cuda", hvd.local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // hvd.local_size()))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    images, labels = digits()
    train = TensorDataset(images[:4000], labels[:4000])
    test_images, test_labels = images[4000:].to(device), labels[4000:].to(device)
    sampler = DistributedSampler(train, world_size, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    steps = args.epochs * len(loader)

    torch.manual_seed(args.seed)
    model = convnet().to(device)
    recipe = {"lr": args.lr, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    if args.dense:
        optimizer = torch.optim.SGD(model.parameters(), **recipe)
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    else:
        warmup_steps = steps // 5 if args.warmup_steps is None else args.warmup_steps
        config = dgc.DGCConfig(density=args.density, warmup_steps=warmup_steps)
        optimizer = dgc.SGD(model.parameters(), **recipe)
        optimizer = dgc_hvd.DistributedOptimizer(
            optimizer, model.named_parameters(), compression=dgc_hvd.DGCCompressor(config)
        )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)

    run = Run(args, steps, rank)
    with logging_redirect_tqdm(), run.bar:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for x, y in run.clocked(loader):
                optimizer.zero_grad()
                loss = cross_entropy(model(x.to(device)), y.to(device))
                loss.backward()
                optimizer.step()
                scheduler.step()
                loss = loss.item()  # waits for the device, so that the clock reads the whole step
            run.test(model, test_images, test_labels, loss)

    if rank == 0 and args.log_file:
        run.write("Horovod", model, world_size, None if args.dense else optimizer.dgc_state.stats)


if __name__ == "__main__":
    main()
