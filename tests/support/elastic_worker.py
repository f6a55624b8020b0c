"""A worker of a real elastic run: test_elastic.py starts it with a folder for its records and the list of hosts.

Two workers on two hosts train until a third comes to the first host. After five steps the one on the second host dies
by SIGKILL in the middle of a sixth; the others train five more.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch

import dgc
import dgc.horovod as dgc_hvd
from support.models import Given, normals
from support.training import SHAPES, outcome, seed_of

folder, hosts = map(Path, sys.argv[1:])
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
hvd.init()
net = Given(SHAPES, seed=os.getpid())
optimizer = dgc_hvd.DistributedOptimizer(
    dgc.SGD(net.parameters(), lr=0.5, momentum=0.5),
    net.named_parameters(),
    dgc_hvd.DGCCompressor(dgc.DGCConfig(density=0.008), bucket_cap_mb=0.1),
)
record = []
"""(number of workers, after sync, after the last commit) for each group that this worker has been in."""


@hvd.elastic.run
def train(state):
    now = outcome(net, optimizer.dgc_state)
    record.append((hvd.size(), now, now))
    steps = 0
    alone = os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1"
    while steps < 5 or not (state.grown and hvd.size() == 2):
        optimizer.zero_grad()
        net(normals(SHAPES, seed_of(state.step, hvd.rank()))).backward()
        if alone and hvd.size() == 3 and steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        state.step += 1
        state.grown |= hvd.size() == 3
        for group in optimizer.param_groups:  # a schedule, which a newcomer has to take up
            group["lr"], group["momentum"] = 0.5 * 0.95**state.step, 0.5 * 0.99**state.step
        steps += 1
        state.save()
        record[-1] = (*record[-1][:2], outcome(net, optimizer.dgc_state))
        torch.save(record, folder / f"{os.getpid()}.pt")
        if hvd.rank() == 0 and state.step == 3:
            hosts.write_text("localhost:2\n127.0.0.1:1\n")
        time.sleep(0.1)
        state.check_host_updates()


train(hvd.elastic.TorchState(model=net, optimizer=optimizer, dgc=optimizer.dgc_state, step=0, grown=False))
