"""dgc.AdamW and dgc.Adam: torch's optimizers of these names, whose direction is accumulated before it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from dgc.local import gradient_of, local
from dgc.ops import Accumulation

from . import saved
from .adam import FIRST, SECOND, check_groups, factors, format_of
from .apply import subtract
from .base import DGCOptimizer, Reducer, Rule
from .own import Own
from .work import Work


class LocalAdam(Own):
    """Keeps m and s of this rank's gradients, and adds a direction, times lr, to v; it has no momentum to mask."""

    kept = (FIRST, SECOND)
    averages = (SECOND,)
    masked = ()
    masked_below = 0.0
    named = "(beta1, beta2, eps)"
    keeps_state = True

    def __init__(self, optimizer: AdamW) -> None:
        """Takes the optimizer."""
        self.optimizer: AdamW = optimizer

    def factors(self, parameter: Tensor, group: Mapping[str, Any], workers: int) -> tuple[float, ...]:
        """Returns dgc.optim.adam.factors; the gradients before this one are counted by accumulated()."""
        return factors(group, self.optimizer.steps_of(parameter) + 1, workers)

    def numbers(self) -> list[tuple[float, ...]]:
        """Returns betas and eps of each parameter group. A newcomer's lr and number of steps follow later."""
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        return [(*map(float, group["betas"]), float(group["eps"])) for group in groups]

    def check(self) -> None:
        """Refuses values that DGC cannot honour.

        Raises:
            ValueError: the message names the value.
        """
        self.optimizer.check_groups(self.optimizer.param_groups)

    def accumulated(self, parameters: Sequence[Tensor], times: int = 1) -> None:
        """Counts the gradients in m and s, which bias correction needs. A step that is left out is in them too."""
        if parameters:  # a bucket may have none of the dropped ones, and torch takes no empty list
            torch._foreach_add_([self.optimizer.state_of(p)["step"] for p in parameters], saved.count(times), alpha=1)

    def brought(self) -> dict[Tensor, dict[str, Tensor]]:
        """Removes the moments of a dense run from the optimizer's state, and returns them."""
        return self.optimizer.take_moments()

    def compress(self, work: Work) -> None:
        """Accumulates, selects and packs in one op."""
        work.compress(Accumulation.ADAM, FIRST, SECOND)


class AdamW(DGCOptimizer):
    """Adam with decoupled weight decay, for gradients that DGC reduces.

    It takes the arguments of torch.optim.AdamW, and gives the same results where everything is sent. On an average of
    sparse, delayed gradients Adam learns badly. So each rank keeps the moments of its own gradients, and what DGC
    accumulates and sends is a direction, lr included (dgc.optim.adam has the equations): the reduced gradient of a
    compressed parameter is its update. Dense parameters get torch.optim.AdamW itself, on the averaged gradient. lr,
    betas and eps are read from the parameter groups at every backward pass, weight decay at every step(); it reaches
    all elements.

    The moments lie in DGCState, float32 whatever the parameter's type; a checkpoint needs the state_dict() of both.
    dgc.AdamW loads the state_dict of torch.optim.AdamW, and goes on with its moments. A parameter's own state has
    `step`, float32 on the CPU: the number of gradients in its moments. A step that is left out counts for compressed
    parameters, since their moments have its gradient, and on a GPU for all. `exp_avg` and `exp_avg_sq` have elements
    only between loading and the next backward pass.

    foreach and fused are taken as hints: compressed parameters have a kernel of their own, dense ones go by foreach.

    Raises:
        ValueError: an argument is out of range, or is one that DGC cannot honour. add_param_group(), load_state_dict()
            and step() raise it too; load_state_dict() then has changed nothing.
    """

    _twin = "AdamW"
    _FORMAT = format_of("AdamW")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """Checks the arguments; see the class."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        self._start(params, defaults)

    def _start(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.check_groups([defaults])
        DGCOptimizer.__init__(self, params, defaults)

    def check_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Refuses parameter groups whose values DGC cannot honour.

        Raises:
            ValueError: the message names the value.
        """
        check_groups(groups, self._FORMAT)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, checking its values."""
        self.check_groups([{**self.defaults, **param_group}])
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over the state that load_state_dict() or pickle has read; changes nothing unless all of it is valid."""
        groups = state["param_groups"]
        saved.check_saved(groups, state["state"], self._FORMAT)
        for group in groups:
            saved.fill(group, self._FORMAT)
        self.check_groups(groups)
        super().__setstate__({**state, "state": saved.take_over(groups, state["state"], self._FORMAT)})
        saved.fill(self.defaults, self._FORMAT)

    def rule(self) -> Rule:
        """Returns the accumulation of Adam's direction."""
        return LocalAdam(self)

    def state_of(self, p: Tensor) -> dict[str, Any]:
        """Returns the state of a parameter, made where it is missing."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state.update(saved.fresh(p, self._FORMAT))
        return state

    def steps_of(self, p: Tensor) -> int:
        """Returns the number of gradients in a parameter's moments."""
        return int(self.state[p]["step"]) if "step" in self.state.get(p, {}) else 0

    def take_moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """Removes the moments of torch.optim.AdamW from loaded state, and returns them by parameter and kind.

        DGCState calls this before it accumulates or saves, and copies them into its memory.
        """
        found: dict[Tensor, dict[str, Tensor]] = {}
        for p, state in self.state.items():
            if moments := {kind: state[kind] for kind in (FIRST, SECOND) if state.get(kind) is not None}:
                found[p] = {kind: value for kind, value in moments.items() if value.shape == p.shape}
                state.update({kind: torch.empty(0, dtype=p.dtype, device=p.device) for kind in found[p]})
        return {p: moments for p, moments in found.items() if moments}

    def _check(self) -> None:
        self.check_groups(self.param_groups)

    def _allocate(self, parameters: Sequence[Tensor]) -> None:
        for p in parameters:
            self.state_of(p)

    def _apply(self, reducer: Reducer | None) -> None:
        """Shrinks all parameters, and subtracts the update of compressed ones, and Adam's of dense ones."""
        if reducer is None:
            return
        for group in self.param_groups:
            compressed, updates, dense, moments = [], [], [], []
            for p in group["params"]:
                if (gradient := gradient_of(p)) is None:
                    continue
                kept = reducer.kept_of(p)
                if kept is None:
                    compressed.append(local(p))
                    updates.append(gradient)
                else:
                    dense.append(p)
                    moments.append(kept)
            shrink = 1 - group["lr"] * group["weight_decay"]
            subtract(compressed, updates, 1.0, reducer.skip, shrink)
            if dense:
                self._step_dense(group, dense, moments, reducer.skip)

    def _step_dense(
        self, group: Mapping[str, Any], parameters: list[Tensor], moments: list[dict[str, Tensor]], skip: Tensor | None
    ) -> None:
        """Takes a step of torch.optim.AdamW, in float32, on tensors that are written back unless `skip` is not 0."""
        changed = [[local(p), kept[FIRST], kept[SECOND]] for p, kept in zip(parameters, moments, strict=True)]
        working = [[_working(x, skip) for x in of] for of in changed]
        adamw(
            [p for p, _, _ in working],
            [gradient.float() for p in parameters if (gradient := gradient_of(p)) is not None],
            [first for _, first, _ in working],
            [second for _, _, second in working],
            [],
            [self.state_of(p)["step"] for p in parameters],
            foreach=group["foreach"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for of, now in zip(changed, working, strict=True):
            for x, value in zip(of, now, strict=True):
                if value is not x:
                    x.copy_(value if skip is None else torch.where(skip != 0, x, value.to(x.dtype)))


class Adam(AdamW):
    """Adam without weight decay, for gradients that DGC reduces; see AdamW, which also has decoupled weight decay.

    It takes the arguments of torch.optim.Adam. There weight decay is added to the gradient, and so goes through the
    moments; here it is refused, unless decoupled_weight_decay says that it is AdamW's.

    Raises:
        ValueError: as AdamW, and for weight decay that is not decoupled.
    """

    _twin = "Adam"
    _FORMAT = format_of("Adam")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        """Checks the arguments; see the class."""
        self._start(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
        )


def _working(x: Tensor, skip: Tensor | None) -> Tensor:
    """Returns a tensor in float32 that may be changed: x itself where nothing is against it."""
    return x.float().clone() if skip is not None else x.float()
