"""A run of local steps on one of several gloo ranks, whose gradients the test chooses."""

import torch
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dgc
import dgc.door
from support.models import Given
from support.training import SHAPES


class RoundRun:
    """One rank's model with its inner optimizer and LocalSteps.

    `inside` says what an island is: None for one rank; "ddp" or "fsdp" for as many ranks as `places`.
    """

    def __init__(
        self, config, every=3, inside=None, places=1, optimizer=torch.optim.SGD, scale=1.0, local=None, **inner
    ):
        dgc.door.BUCKET_CAP_MB = 0.05  # several groups
        self.net = Given(SHAPES)
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(scale)
        self.model, options = self.net, {}
        if inside is not None:
            mesh = init_device_mesh("cpu", (get_world_size() // places, places), mesh_dim_names=("islands", "inside"))
            options = {"mesh": mesh}
            if inside == "ddp":
                group = mesh["inside"].get_group()
                self.model = DistributedDataParallel(self.net, process_group=group)
            else:
                fully_shard(self.net, mesh=mesh["inside"])
                self.net.set_force_sum_reduction_for_comms(True)  # gloo returns sums for averages (pytorch#162338)
        self.inner = optimizer(self.model.parameters(), **{"lr": 1.0, **inner})
        self.local = dgc.LocalSteps(self.model, self.inner, config, every=every, **options, **(local or {}))

    def train(self, gradients):
        self.inner.zero_grad()
        self.model(gradients).sum().backward()
        self.inner.step()

    def result(self):
        """Returns whole weights, and this rank's part of what the state keeps, flat."""
        memory = self.local.state.memory

        def whole(p):
            return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()

        return {
            "parameters": {n: whole(p) for n, p in self.net.named_parameters()},
            "start": {n: whole(p) for n, p in self.local._start.items()},
            "residual": {n: memory.residual_of(n).flatten().clone() for n in memory.compressed},
            "momentum": {n: memory.of(n)["momentum"].flatten().clone() for n in memory.slots if memory.kinds},
            "rounds": self.local.rounds,
            "position": self.local.position,
            "stats": self.local.state.stats,
        }
