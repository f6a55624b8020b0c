"""Host memory: theta_0 and all that is made of it on the CPU, where the weights are on a GPU that has no room for it.

Only weights cross: to the host when a round is sent, back when it has arrived. What is on the CPU is reduced there, by
the kernels of the CPU, which give the GPU's bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgc.exchange.base import Exchange
from dgc.exchange.distributed import DistributedExchange
from dgc.exchange.islands import IslandExchange
from dgc.local import mesh_of


def theta_0_of(weight: Tensor, on_host: bool) -> nn.Parameter:
    """Returns a copy of a weight, float32, since a round may move it by less than a 16-bit type can say.

    Args:
        weight: of the model.
        on_host: whether the copy is in the host's memory, pinned where the weight is on a GPU.
    """
    if not on_host:
        return nn.Parameter(weight.detach().to(torch.float32, copy=True))
    start = weight.detach().to("cpu", torch.float32, copy=True)
    return nn.Parameter(start.pin_memory() if _pins(weight) else start)


def way_of(weight: Tensor, start: Tensor, on_host: bool) -> Tensor:
    """Returns theta_0, as rounded to the weight's type, less the weight; float32, on the device of theta_0."""
    weight, start = weight.detach(), start.detach()
    if not on_host:
        return start.to(weight.dtype).float() - weight.float()
    way = torch.empty_like(start, pin_memory=_pins(weight)).copy_(weight)
    return torch.sub(start.to(weight.dtype).float(), way, out=way)


def copy_of(weight: Tensor, on_host: bool) -> Tensor:
    """Returns a copy of a plain tensor, on its device or in the host's memory."""
    if not on_host:
        return weight.clone()
    return torch.empty_like(weight, device="cpu", pin_memory=_pins(weight)).copy_(weight)


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Checks that theta_0 of these weights can be in the host's memory.

    Raises:
        ValueError: fully_shard has sharded them on a GPU.
    """
    if any(mesh_of(p) is not None and p.device.type != "cpu" for p in weights.values()):
        raise ValueError(
            "cpu_offload: expected a model whose ranks each hold all of it, got one that fully_shard has sharded on a "
            "GPU, which is not supported. Leave it out: the ranks of an island divide theta_0 and e as it is"
        )


def check_groups(exchange: Exchange) -> None:
    """Checks that rounds can be exchanged on the CPU.

    Raises:
        ValueError: a process group has no backend for the CPU.
    """
    if not (isinstance(exchange, DistributedExchange) and dist.is_available() and dist.is_initialized()):
        return
    for group in [exchange.group, *([exchange.node] if isinstance(exchange, IslandExchange) else [])]:
        if "cpu:" not in (backends := dist.get_backend_config(group)):
            raise ValueError(
                f"cpu_offload: expected a process group that takes tensors on the CPU, got one of {backends}. Write "
                'init_process_group("cpu:gloo,cuda:nccl"): the model inside an island stays with NCCL'
            )


def _pins(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_available()
