"""Trains a CNN on 5,000 MNIST digits with Horovod, with DGC or without: the training of mnist.py, line for line.

    horovodrun -np 2 python examples/horovod_mnist.py
    horovodrun -np 2 python examples/horovod_mnist.py --dense
    horovodrun -np 8 -H host1:4,host2:4 python examples/horovod_mnist.py --nodes

launch/install_horovod.sh installs Horovod, launch/horovodrun.sh starts it.
"""

import horovod.torch as hvd
import torch
from digits import RECIPE, Run, convnet, dgc_config, options, set_up, split, train_step
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc
import dgc.horovod as dgc_hvd


def main() -> None:
    """Trains on this rank."""
    parser = options()
    parser.add_argument("--nodes", action="store_true", help="makes each host a worker, with all of its processes")
    args = parser.parse_args()
    hvd.init(process_sets="dynamic" if args.nodes else None)
    rank, world_size = hvd.rank(), hvd.size()
    cuda = torch.cuda.device_count() >= hvd.local_size()  # one GPU for each process of this machine, or none
    device = torch.device("cuda", hvd.local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    set_up(rank, hvd.local_size())

    train, test_images, test_labels = split(device)
    sampler = DistributedSampler(train, world_size, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    steps = args.epochs * len(loader)

    torch.manual_seed(args.seed)
    model = convnet().to(device)
    if args.dense:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, **RECIPE)
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    else:
        optimizer = dgc.SGD(model.parameters(), lr=args.lr, **RECIPE)
        optimizer = dgc_hvd.DistributedOptimizer(
            optimizer,
            model.named_parameters(),
            compression=dgc_hvd.DGCCompressor(dgc_config(args, steps)),
            nodes="auto" if args.nodes else None,
        )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)

    run = Run(args, steps, rank)
    with logging_redirect_tqdm(), run.bar:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for x, y in run.clocked(loader):
                loss = train_step(model, optimizer, scheduler, x.to(device), y.to(device))
            run.test(model, test_images, test_labels, loss)

    if rank == 0 and args.log_file:
        run.write("Horovod", model, world_size, None if args.dense else optimizer.dgc_state.stats)


if __name__ == "__main__":
    main()
