"""A model's parameters and the optimizer that holds them: names, groups, the rule, and which parameters stay dense."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from dgc.config import DGCConfig
from dgc.local import local, mesh_of
from dgc.optim.apply import all_zero
from dgc.optim.foreign import rule_of

from .names import by_name
from .refusals import check_held, check_names, dense_reasons, unwrapped
from .slots import Slot, by_rows, laid_out_again, lay_out


class Parameters:
    """The trainable parameters of a model, their places in memory, and their optimizer's settings for them.

    Raises:
        ValueError: parameters that are missing, duplicate, of an unsupported type or on several devices; an optimizer
            with momentum of its own.
    """

    _groups: dict[str, Mapping[str, Any]]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        config: DGCConfig,
        loss_scaling: bool = False,
        place: int = 0,
        places: int = 1,
    ) -> None:
        """Checks everything; see the class.

        Args:
            named_parameters: the user's.
            optimizer: the user's, perhaps in a wrapper.
            config: the user's.
            loss_scaling: whether a GradScaler scales the loss.
            place: of this rank among those of its node that divide the memory of plain parameters.
            places: their number; 1 where each rank keeps all.
        """
        self.optimizer = unwrapped(optimizer)
        self.rule = rule_of(self.optimizer)
        self.by_name = by_name(named_parameters)
        self.refresh()
        check_names(self.by_name, self.optimizer)
        self.never_compressed = dense_reasons(self.by_name, config)
        """Parameters that are dense in every phase, with the reason."""
        if places > 1:
            crossed = [name for name, p in self.by_name.items() if p.ndim > 1 and not by_rows(p)]
            self.never_compressed.update(dict.fromkeys(crossed, "its rows are not stretches of memory"))
        self.compressed = [name for name in self.by_name if name not in self.never_compressed]
        self.slots = lay_out(self.by_name, self.compressed, place, places)
        self._slots = {id(p): self.slots[name] for name, p in self.by_name.items()}
        self._strides = {name: local(p).stride() for name, p in self.by_name.items()}
        self.rule.check_use(loss_scaling=loss_scaling, skipping=config.on_nonfinite == "skip")
        self.device = next(iter(self.by_name.values())).device
        self.mesh = next((mesh for p in self.by_name.values() if (mesh := mesh_of(p)) is not None), None)
        """The ranks over which fully_shard has sharded the parameters; None where each rank has all of them."""
        self.came_dense = False
        """Whether the optimizer has brought the tensors of a dense run."""

    def refresh(self) -> None:
        """Looks up the optimizer's group of each parameter.

        It is called before each pass, since load_state_dict() replaces the groups, and users remove or reorder them.

        Raises:
            ValueError: a parameter is in none; or a group has a value that the rule refuses.
        """
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        check_held(self.by_name, group_of)
        self._groups = {name: group_of[id(p)] for name, p in self.by_name.items()}
        self.rule.check()

    def lay_out_again(self) -> dict[str, Slot]:
        """Returns new slots, by name, for parameters whose memory format has changed since, and goes by them."""
        changed = {
            name: laid_out_again(self.slots[name], local(p))
            for name, p in self.by_name.items()
            if local(p).stride() != self._strides[name]
        }
        for name, slot in changed.items():
            p = self.by_name[name]
            self.slots[name] = self._slots[id(p)] = slot
            self._strides[name] = local(p).stride()
        return changed

    def slot(self, parameter: Tensor) -> Slot:
        """Returns where a parameter lies in memory.

        Raises:
            ValueError: named_parameters did not have it, or it was frozen.
        """
        slot = self._slots.get(id(parameter))
        if slot is not None:
            return slot
        if not parameter.requires_grad:
            raise ValueError(
                f"DGCState: expected gradients of trainable parameters, got one of shape {tuple(parameter.shape)} that "
                "was frozen, requires_grad_(False), after DDP had wrapped the model: DDP goes on reducing it. Freeze "
                "it before DDP wraps the model, or leave it trainable, in a parameter group with lr = 0"
            )
        raise ValueError(
            f"DGCState: expected the parameters of named_parameters, got a gradient for another one, of shape "
            f"{tuple(parameter.shape)}. Pass named_parameters() of the model that the hook is registered on"
        )

    def factors(self, name: str, workers: int) -> tuple[float, ...]:
        """Returns the rule's numbers for a parameter in the coming pass; see Rule.factors."""
        return self.rule.factors(self.by_name[name], self._groups[name], workers)

    def accumulated(self, names: Iterable[str], times: int = 1) -> None:
        """Counts a pass of some compressed parameters; see Rule.accumulated."""
        self.rule.accumulated([self.by_name[name] for name in names], times)

    def brought(self) -> list[tuple[str, dict[str, Tensor]]]:
        """Removes the tensors of a dense run from the optimizer's state, and returns them by name and kind."""
        found = self.rule.brought()
        self.came_dense |= bool(found)
        # Without those of parameters that are frozen by now.
        return [(self._slots[id(p)].name, kinds) for p, kinds in found.items() if id(p) in self._slots]

    def not_reduced(self, reduced: Collection[str]) -> list[str]:
        """Returns the names of parameters whose gradient the optimizer would apply, though it was not exchanged.

        Args:
            reduced: names of the parameters whose gradients this pass has reduced.
        """
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        names = [slot.name if (slot := self._slots.get(id(p))) else f"one of shape {tuple(p.shape)}" for p in held]
        unreduced = [(name, p) for name, p in zip(names, held, strict=True) if name not in reduced]
        return [] if all_zero(p for _, p in unreduced) else [name for name, _ in unreduced]

    def without_gradient(self, reduced: Collection[str]) -> list[str]:
        """Returns the names of parameters without .grad whose gradient this pass has not reduced."""
        return [name for name, p in self.by_name.items() if p.grad is None and name not in reduced]
