"""Trains a network by Ray Train on two CPU workers; a checkpoint an epoch has what waits on all of them.

    python examples/ray_mlp.py --epochs 4

The data are made up. A second run, with more epochs, goes on from the checkpoint of the first. --dense leaves DGC out.
"""

import argparse
import tempfile
from pathlib import Path

import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

import dgc


def train(args: dict) -> None:
    """Trains on this worker."""
    torch.manual_seed(args["seed"])
    worker = ray.train.get_context().get_world_rank()
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    model, done, sent = prepare_model(net), 0, 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = None if args["dense"] else dgc.attach(model, optimizer, dgc.DGCConfig(density=0.01, warmup_steps=30)).dgc
    x = torch.randn(8192, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "run.pt"), weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["epoch"]
        state and state.load_state_dict(saved["dgc"])  # this worker's part
    for epoch in range(done + 1, args["epochs"] + 1):
        for batch in torch.randperm(4096, generator=torch.Generator().manual_seed(epoch))[worker::2].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        loss = nn.functional.cross_entropy(net(x[4096:]), y[4096:]).item()
        run = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        if state:
            run["dgc"], sent = state.full_state_dict(), state.stats.bytes_sent  # on all workers; {} but on the first
        with tempfile.TemporaryDirectory() as folder:
            torch.save(run, Path(folder, "run.pt"))
            checkpoint = None if worker else ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"test loss": round(loss, 4), "bytes a step": sent}, checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--folder", "runs/ray"), ("--epochs", 4), ("--seed", 0)):
        parser.add_argument(option, type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--dense", action="store_true", help="without DGC")
    arguments = parser.parse_args()
    where = ray.train.RunConfig(name="run", storage_path=str(Path(arguments.folder).absolute()))
    settings = {"scaling_config": ray.train.ScalingConfig(num_workers=2), "run_config": where}
    print(TorchTrainer(train, train_loop_config=vars(arguments), **settings).fit().metrics)
