"""DGCState: the object that a user makes. It reduces gradients, and holds, saves and loads what is not sent yet."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer

from .config import DGCConfig
from .copied import Copy
from .exchange.base import Exchange, Islands
from .exchange.distributed import DistributedExchange
from .exchange.islands import IslandExchange, nodes_of
from .memory.parameters import Parameters
from .ops.codec import Codec, EliasFano
from .rebind import Rebound, note_saved
from .stats import Stats
from .step import advice, log
from .step.lifecycle import Pass
from .step.standing import Standing


class DGCState(Rebound):
    """Reduces gradients by Deep Gradient Compression, and holds what has not been sent yet.

    All ranks compare configuration and parameters before the first exchange: if process_group is given, when the state
    is made; else in register(), or in the first backward pass.

    Args:
        named_parameters: all of the model's. A wrapper's part of the names, such as "module." in front of all of them
            or "_orig_mod.", is removed.
        optimizer: the one that applies the gradients. dgc.SGD gets momentum correction, dgc.AdamW the
            accumulation of its direction, an optimizer without momentum plain accumulation (paper, Algorithm 1). A
            wrapper, such as Accelerate's, is unwrapped.
        config: the same on all ranks.
        process_group: None for the group of the DDP module that the state is registered on. For a model sharded by
            fully_shard, in place of mesh, the ranks that hold the same shard, one of each node.
        mesh: makes each node a worker: gradients are averaged inside the node, and exchanged between nodes. A
            DeviceMesh of two dimensions, nodes and ranks of a node; or "auto" for nodes of LOCAL_WORLD_SIZE ranks.
            Under DDP the ranks of a node then divide momentum and residual among themselves. None: each rank is a
            worker of its own.
        grad_scaler: the torch.amp.GradScaler that scales the loss. Gradients are unscaled before they are accumulated,
            and results are scaled again, so that scaler.step(optimizer) and scaler.update() work as always.
        exchange: the collectives of another framework; None for torch.distributed.
        average: whether the update is the mean of the ranks' gradients. False: their sum (Horovod's op=Sum).
        codec: turns entries into bytes; None for the wire format of docs/wire.md.
        late: whether the verdict on a step is read in the next backward pass. Results are the same, and an error comes
            one step later. None: True on a GPU, since waiting for the verdict would stall the host.

    Raises:
        ValueError: parameters that are missing, duplicate, of an unsupported type or on several devices; an optimizer
            with momentum of its own; ranks that differ.
        TypeError: an argument is of another type; the message says what to write.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        config: DGCConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | Literal["auto"] | None = None,
        grad_scaler: GradScaler | None = None,
        exchange: Exchange | None = None,
        average: bool = True,
        codec: Codec | None = None,
        late: bool | None = None,
    ) -> None:
        """Checks the arguments, agrees with the other ranks where these are known, and allocates v, and u if needed."""
        if config is not None and not isinstance(config, DGCConfig):
            raise TypeError(advice.no_config(config))
        if grad_scaler is not None and not isinstance(grad_scaler, GradScaler):
            raise TypeError(f"grad_scaler: expected a torch.amp.GradScaler or None, got {type(grad_scaler).__name__}")
        config = config or DGCConfig()
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        nodes = nodes_of(mesh) if mesh is not None else None
        place = (0, 1) if nodes is None else (nodes.get_local_rank(1), nodes.size(1))
        if isinstance(exchange, Islands):
            place = exchange.place, exchange.places
        parameters = Parameters(named_parameters, optimizer, config, scaler is not None, *place)
        device = parameters.device
        exchange = exchange or _exchange(parameters, process_group, nodes)
        codec = codec or EliasFano(config.wire_dtype)
        standing = Standing(config, parameters, exchange, codec, scaler is not None)
        super().__init__(standing, scaler, average, device.type == "cuda" if late is None else late)
        if device.type != "cpu" and exchange.rank == 0:
            log.log_backend(device.type)
        log.log_masked(parameters.compressed)
        # The optimizer does not own the state, so that a state that the user drops frees its memory at once.
        parameters.rule.attach(self)
        parameters.optimizer.register_state_dict_post_hook(partial(note_saved, weakref.ref(self)))

    def __repr__(self) -> str:
        """Says what is compressed, and where the run stands."""
        p, exchange = self._standing.parameters, self._standing.own_exchange
        return (
            f"DGCState({len(p.compressed)} of {len(p.by_name)} parameters compressed, density {self.density:g}"
            f"{', switched off' if self.dense else ''}, step {self.step}, {self._stats.total_bytes_sent:,} bytes sent, "
            f"rank {exchange.rank} of {exchange.world_size})"
        )

    @property
    def made_with(self) -> DGCConfig:
        """The configuration that the state was made with; `config` has the density of set_density()."""
        return self._standing.made_with

    # Figures.

    @property
    def stats(self) -> Stats:
        """Figures of the last backward pass; reading them changes nothing."""
        return self._stats

    @property
    def residual_norm(self) -> float:
        """Euclidean norm of the residual v. It reads all of v, so it is too slow for every step."""
        return float(torch.linalg.vector_norm(self.memory.residual, dtype=torch.float64))

    def watch_ages(self, sample: int = 4096) -> None:
        """Begins to watch how long entries wait before they are sent, in a sample of them; see `stats.age`.

        A step then costs a little more, and every hundredth waits for the GPU. The watch is in no checkpoint.

        Args:
            sample: the number of entries to watch, about.

        Raises:
            ValueError: it is not positive.
        """
        if not sample > 0:
            raise ValueError(f"sample: expected a number of entries > 0, got {sample!r}")
        self.memory.watch(sample, self.step)

    # The last pass, for LocalSteps, which takes weights back where a round fails.

    @property
    def last_pass(self) -> Pass:
        """The last pass that has begun; it may be over."""
        return self._pass

    @property
    def accumulated(self) -> set[str]:
        """Names of the parameters whose gradients the last pass has put into memory, whatever became of its step."""
        parameters = self._standing.parameters
        # A rank without rows of a divided parameter sends none of it, but others of its node do.
        kept = {name for name, slot in parameters.slots.items() if slot.numel or name in parameters.never_compressed}
        return self._pass.reduced - (self._standing.layouts.phase.dense.keys() & kept)

    # Copies of the whole object.

    def __getstate__(self) -> dict[str, Any]:
        """Returns parameters, optimizer, configuration and this rank's share, without the process group; between steps.

        Pickle model, optimizer and state in one object, torch.save({"model": ddp, ...}), so that they stay connected.
        """
        return self.pickled()

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Makes a state that agrees with the other ranks at its first backward pass."""
        DGCState.__init__(self, saved["named"].items(), saved["optimizer"], **saved["arguments"])
        self.unpickle(saved["share"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Copy:
        """Returns an empty Copy: a copy of a model with the hook, as for a weight average, needs no second u and v."""
        return Copy()


def _exchange(
    parameters: Parameters, process_group: dist.ProcessGroup | None, nodes: DeviceMesh | None
) -> DistributedExchange:
    """Returns the exchange over torch.distributed: between nodes where these are the workers, else between ranks.

    Raises:
        ValueError: the groups do not fit each other, or the shards of the parameters.
    """
    if nodes is not None and process_group is not None:
        raise ValueError("process_group: expected None with mesh, which has the groups, got both")
    if (sharded := parameters.mesh) is None:
        if nodes is None:
            return DistributedExchange(parameters.device, process_group)
        return IslandExchange(parameters.device, nodes.get_group(0), nodes.get_group(1))
    if nodes is not None:
        process_group = nodes.get_group(0)
    if process_group is None:
        raise ValueError(
            'mesh: expected that of nodes and their ranks for a model sharded by fully_shard, got None, or "auto" with '
            "one node or nodes of one rank. With mesh = "
            'init_device_mesh(device, (nodes, ranks_of_a_node), mesh_dim_names=("replicate", "shard")) and '
            'fully_shard(module, mesh=mesh["shard"]), pass mesh=mesh'
        )
    return IslandExchange(parameters.device, process_group, sharded.get_group())
