"""HorovodState: the DGCState of an optimizer that DistributedOptimizer has made, also when the model changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import horovod.torch as hvd
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from .exchange.base import Exchange
from .exchange.horovod import HorovodExchange
from .horovod_fusion import Fusion, fuse
from .memory.parameters import Parameters
from .state import DGCState

NONAME = "allreduce.noname."
"""The beginning of the names that Horovod gives where it is told none."""


class HorovodState(DGCState):
    """A DGCState to which Horovod's hooks pass gradients, and whose changed model they follow.

    After rebind(model) it knows the module, and finds a parameter of it that something has replaced in step().
    """

    _hooks: tuple[RemovableHandle, ...] = ()

    def connect(self) -> None:
        """Has the optimizer's parameters pass their gradients to this state, and those of before to none."""
        optimizer: Any = self.optimizer
        named = self._standing.parameters.by_name
        self.disconnect()
        optimizer.dgc_state = self
        optimizer._fusion = Fusion(self, fused(optimizer, named))
        optimizer._parameter_names = {p: name for name, p in named.items()}
        optimizer._requires_update = set(named.values())
        optimizer._allreduce_delay = dict.fromkeys(named.values(), optimizer.backward_passes_per_step)
        optimizer._handles, optimizer._synchronized = {}, False
        # Horovod has them on the nodes of autograd, where a loss that is still held would keep them alive.
        hooks = [p.register_post_accumulate_grad_hook(optimizer._make_hook(p)) for p in named.values()]
        self._hooks = tuple(hooks)

    def disconnect(self) -> None:
        """Removes the hooks: gradients of later passes stay this rank's own."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    # What rebind() asks of a door.

    def _new_parameters(
        self, model: nn.Module | Iterable[tuple[str, Tensor]], into: Optimizer, back: Mapping[str, Mapping[str, Tensor]]
    ) -> Parameters:
        its = getattr(into, "dgc_state", None)
        if not isinstance(its, HorovodState):
            raise ValueError(
                f"optimizer: expected one that dgc.horovod.DistributedOptimizer has made, got {type(into).__name__}, "
                "which does not exchange gradients. Wrap it first, with the changed model's named_parameters()"
            )
        if its is not self:
            its.disconnect()  # the hooks of the present one are there, until all has been checked
            mine, other = self._made_with(), its._made_with()
            if differ := [f"{what} {other[what]}, not {mine[what]}" for what in mine if mine[what] != other[what]]:
                raise ValueError(
                    f"optimizer: expected one wrapped as the present one was, got {'; '.join(differ)}. The run goes on "
                    "as it began; to change the density: set_density()"
                )
        if any(name.startswith(NONAME) for name in self._standing.parameters.by_name):
            raise ValueError(
                "rebind: expected parameters that go over by their names, got an optimizer that was wrapped without. "
                "Pass model.named_parameters() to DistributedOptimizer"
            )
        return super()._new_parameters(model, into, back)

    def _exchange_of(self, parameters: Parameters) -> Exchange:
        optimizer, named = parameters.optimizer, parameters.by_name
        exchange = self._standing.own_exchange
        assert isinstance(exchange, HorovodExchange)
        return exchange.agreeing_on(agreed(optimizer, named, fused(optimizer, named)))

    def _register_again(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        self.connect()
        self._plain = weakref.ref(model) if isinstance(model, nn.Module) else None
        self._wrapped_later = True

    def _made_with(self) -> dict[str, object]:
        exchange = self._standing.own_exchange
        assert isinstance(exchange, HorovodExchange)
        op = "hvd.Average" if self._average else "hvd.Sum"
        return {"config": self._standing.made_with, "op": op, "process_set": str(exchange.process_set)}


def fused(optimizer: Any, named: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Returns the groups in which the parameters of an optimizer travel.

    Args:
        optimizer: made by DistributedOptimizer.
        named: its trainable parameters.
    """
    trainable = {id(p) for p in named.values()}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in trainable]
    groups = optimizer._grouping
    if isinstance(groups, list):
        groups = [[named[name] for name in group if name in named] for group in groups]
    return fuse(held, groups, optimizer._compression.bucket_cap_mb)


def agreed(optimizer: Any, named: Mapping[str, Tensor], groups: list[list[Tensor]]) -> dict[str, object]:
    """Returns what processes compare besides configuration and parameters."""
    names = {p: name for name, p in named.items()}
    return {
        "op": "Average" if optimizer.op == hvd.Average else "Sum",
        "gradient_predivide_factor": optimizer.gradient_predivide_factor,
        "backward_passes_per_step": optimizer.backward_passes_per_step,
        **{f"group of {names[p]}": i for i, group in enumerate(groups) for p in group},
    }
