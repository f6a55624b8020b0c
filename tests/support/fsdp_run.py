"""A run behind FSDP2 on one of several gloo ranks: nodes of ranks that hold the model together."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dgc
import dgc.door
from support.models import Given
from support.training import SHAPES


class IslandRun:
    """One rank's model, sharded over its node, with optimizer and state."""

    def __init__(
        self,
        places,
        config=None,
        shapes=SHAPES,
        module=None,
        optimizer=dgc.SGD,
        bucket_cap_mb=0.05,
        in_step=False,
        register=True,
        fully=None,
        device="cpu",
        **settings,
    ):
        dgc.door.BUCKET_CAP_MB = bucket_cap_mb  # several groups
        nodes = torch.distributed.get_world_size() // places
        self.mesh = init_device_mesh(str(device).split(":")[0], (nodes, places), mesh_dim_names=("replicate", "shard"))
        self.net = (Given(shapes) if module is None else module).to(device)
        for child in self.net.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=self.mesh["shard"], **(fully or {}))
        fully_shard(self.net, mesh=self.mesh["shard"], **(fully or {}))
        defaults = {"lr": 0.5, "momentum": 0.5} if optimizer is dgc.SGD else {}
        self.optimizer = optimizer(self.net.parameters(), **{**defaults, **settings})
        self.state = dgc.DGCState(
            self.net.named_parameters(),
            self.optimizer,
            config or dgc.DGCConfig(density=0.008),
            process_group=self.mesh["replicate"].get_group(),
        )
        if register:
            self.state.register(self.net, in_step=in_step)

    def backward(self, *inputs):
        self.net(*inputs).sum().backward()

    def train(self, *inputs):
        self.optimizer.zero_grad()
        self.backward(*inputs)
        self.optimizer.step()

    def rebind(self, **back):
        return self.state.rebind(self.net, **back)

    def result(self):
        """Returns whole parameters, and this rank's parts of what it keeps, flat."""
        memory = self.state.memory
        kept = {kind: {n: memory.of(n)[kind].flatten().clone() for n in memory.slots} for kind in memory.kinds}
        return {
            "parameters": {n: p.full_tensor().detach().clone() for n, p in self.net.named_parameters()},
            "residual": {n: memory.residual_of(n).flatten().clone() for n in memory.compressed},
            "momentum": {},
            **kept,
            "pieces": {n: (slot.piece.begin, slot.numel) for n, slot in memory.slots.items()},
            "stats": self.state.stats,
            "step": self.state.step,
        }


def whole(results, nodes, places, kind, name):
    """Puts together, for each node, what its ranks keep of a parameter."""
    return [torch.cat([results[node * places + place][kind][name] for place in range(places)]) for node in range(nodes)]


def shares_of(results, places, kind, name):
    """Returns what each worker, a rank without places or a node, keeps of a parameter, flat."""
    if places is None:
        return [r[kind][name].flatten() for r in results]
    return whole(results, len(results) // places, places, kind, name)
