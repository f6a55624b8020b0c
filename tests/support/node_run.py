"""A run behind DDP on one of several gloo ranks, where each node of ranks is a worker."""

from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh

from support.ddp_run import Run


def parts(net, state):
    """Returns parameters, and this rank's parts of what it keeps, flat."""
    memory = state.memory
    kept = {kind: {n: memory.of(n)[kind].flatten().clone() for n in memory.slots} for kind in memory.kinds}
    return {
        "parameters": {n: p.detach().clone() for n, p in net.named_parameters()},
        "residual": {n: memory.residual_of(n).flatten().clone() for n in memory.compressed},
        "momentum": {},
        **kept,
        "stats": state.stats,
        "step": state.step,
    }


class NodeRun(Run):
    """One rank's model behind DDP, with momentum and residual divided among the ranks of its node."""

    def __init__(self, places, config=None, shapes=None, device="cpu", **settings):
        kind = str(device).split(":")[0]
        mesh = init_device_mesh(kind, (get_world_size() // places, places), mesh_dim_names=("replicate", "shard"))
        settings = {**settings, "state": {"mesh": mesh, **settings.get("state", {})}}
        super().__init__(config, **({} if shapes is None else {"shapes": shapes}), device=device, **settings)

    def result(self):
        """Returns parameters, and this rank's parts of what it keeps, flat."""
        return parts(self.net, self.state)
