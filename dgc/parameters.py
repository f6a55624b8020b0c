"""A model's parameters and the optimizer that holds them: what DGC asks of both, and which parameters stay dense."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .config import DGCConfig
from .optim import SGD

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DDP and torch.compile put in front of names."""


class Parameters:
    """The trainable parameters of a model, and what their optimizer says of them.

    Raises:
        ValueError: parameters that are missing, double, of an unsupported type or on several devices; an optimizer
            with momentum of its own.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        config: DGCConfig,
        loss_scaling: bool = False,
    ) -> None:
        """Checks everything; see the class."""
        self.by_name = by_name(named_parameters)
        self.optimizer = optimizer
        self._names = {id(p): name for name, p in self.by_name.items()}
        self._group_of = group_indices(self.by_name, optimizer)
        self.never_compressed = dense_reasons(self.by_name, config)
        """Those dense in every phase, with the reason."""
        check_optimizer(optimizer, config, loss_scaling)
        self.device = next(iter(self.by_name.values())).device

    def name(self, parameter: Tensor) -> str:
        """Returns a parameter's name.

        Raises:
            ValueError: named_parameters did not have it.
        """
        name = self._names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"DGCState: expected the parameters of named_parameters, got a gradient for another one, of shape "
                f"{tuple(parameter.shape)}. Pass named_parameters() of the model that the hook is registered on"
            )
        return name

    def momentum(self, name: str) -> float:
        """Returns a parameter's momentum factor now; 0 where the optimizer knows none."""
        if not isinstance(self.optimizer, SGD):
            return 0.0
        # By index: load_state_dict() replaces the groups.
        return float(self.optimizer.param_groups[self._group_of[name]]["momentum"])

    @property
    def any_momentum(self) -> bool:
        """Whether any parameter has momentum now."""
        return any(map(self.momentum, self.by_name))

    @property
    def nesterov(self) -> bool:
        """Whether momentum is Nesterov's."""
        return isinstance(self.optimizer, SGD) and bool(self.optimizer.param_groups[0]["nesterov"])

    def check_gradients(self) -> None:
        """Looks whether the optimizer would apply a gradient that nobody reduces.

        Raises:
            ValueError: it would.
        """
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if local := [p for p in held if id(p) not in self._names]:
            raise ValueError(
                f"optimizer: expected gradients of the parameters that named_parameters had, got those of "
                f"{len(local)} more, of shape {', '.join(str(tuple(p.shape)) for p in local)}, which no rank has sent. "
                "They were frozen, or not there, when DGCState was made: make optimizer and DGCState again"
            )


def by_name(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the trainable parameters by name, without wrappers' prefixes.

    Raises:
        ValueError: a name or a parameter comes twice, a type is not supported, or there is none.
    """
    parameters: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for full_name, parameter in named_parameters:
        name = full_name
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        if name in parameters or id(parameter) in seen:
            other = seen.get(id(parameter), name)
            raise ValueError(
                f"named_parameters: expected each parameter once, got {name!r} twice (also as {other!r}). "
                "Pass model.named_parameters(), which leaves duplicates out"
            )
        if not parameter.requires_grad:
            continue
        if parameter.dtype not in SUPPORTED:
            raise ValueError(
                f"{name}: expected float32, bfloat16 or float16, got {parameter.dtype}. DGC cannot accumulate it: "
                "convert the parameter, or freeze it"
            )
        parameters[name] = parameter
        seen[id(parameter)] = name
    if not parameters:
        raise ValueError("named_parameters: expected at least one parameter that requires a gradient, got none")
    devices = sorted({str(p.device) for p in parameters.values()})
    if len(devices) != 1:
        raise ValueError(f"named_parameters: expected all on one device, got {', '.join(devices)}")
    return parameters


def group_indices(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, int]:
    """Returns the index of each parameter's group in the optimizer.

    Raises:
        ValueError: optimizer and named_parameters do not hold the same parameters.
    """
    index = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    not_held = [name for name, p in parameters.items() if id(p) not in index]
    if not_held:
        raise ValueError(
            f"optimizer: expected it to hold every parameter, but not {', '.join(not_held)}: their gradients would be "
            "reduced and never applied. Pass them to the optimizer, or set requires_grad=False"
        )
    known = {id(p) for p in parameters.values()}
    unnamed = [
        f"{tuple(p.shape)} in group {i}"
        for i, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if p.requires_grad and id(p) not in known
    ]
    if unnamed:
        raise ValueError(
            f"named_parameters: expected all that the optimizer holds, but {len(unnamed)} are missing, of shape "
            f"{', '.join(unnamed)}. Pass model.named_parameters() of the whole model"
        )
    return {name: index[id(p)] for name, p in parameters.items()}


def check_optimizer(optimizer: Optimizer, config: DGCConfig, loss_scaling: bool) -> None:
    """Refuses optimizers that would apply momentum a second time; warns of those outside the paper.

    Raises:
        ValueError: the message says why and what to use.
    """
    if isinstance(optimizer, SGD):
        if len({bool(group["nesterov"]) for group in optimizer.param_groups}) > 1:
            raise ValueError("nesterov: expected the same in all parameter groups, got both True and False")
        return
    kind = type(optimizer).__name__
    if loss_scaling and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"optimizer: expected {kind}(fused=False) with a GradScaler, which calls step() of a fused one also where "
            "the step is to be left out"
        )
    if config.on_nonfinite == "skip":
        raise ValueError(f'on_nonfinite: expected "raise" with {kind}; only dgc.SGD can leave a step out')
    if any(group.get("momentum", 0) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: expected dgc.SGD, got {kind} with momentum > 0. DGC applies momentum before it selects what "
            "to send; a second one would be applied to the sparse updates. Use dgc.SGD with the same arguments"
        )
    if any("betas" in group for group in optimizer.param_groups):
        warnings.warn(
            f"dgc: {kind} is outside the paper: sparse, delayed gradients mislead its second moment. "
            "Accuracy may suffer; dgc.SGD is what DGC was made for",
            stacklevel=4,
        )


def dense_reasons(parameters: Mapping[str, Tensor], config: DGCConfig) -> dict[str, str]:
    """Returns the parameters that are never compressed, with the reason.

    Raises:
        ValueError: config.dense_parameters names one that is not there.
    """
    unknown = sorted(set(config.dense_parameters) - parameters.keys())
    if unknown:
        raise ValueError(
            f"dense_parameters: expected names of parameters, got {', '.join(unknown)}; there are "
            f"{', '.join(parameters)}"
        )
    reasons = {}
    for name, p in parameters.items():
        if name in config.dense_parameters:
            reasons[name] = "named in dense_parameters"
        elif p.ndim <= 1:
            reasons[name] = "fewer than two dimensions"
        elif p.numel() < max(1, config.dense_below):
            reasons[name] = f"fewer than {config.dense_below} elements"
    return reasons
