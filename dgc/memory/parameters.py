"""A model's parameters and the optimizer that holds them: what DGC asks of both, and which parameters stay dense."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from dgc.config import DGCConfig
from dgc.optim.sgd import SGD, all_zero, check_groups

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and torch's activation checkpointing put into names, anywhere."""


class Parameters:
    """The trainable parameters of a model, and what their optimizer says of them.

    Raises:
        ValueError: parameters that are missing, double, of an unsupported type or on several devices; an optimizer
            with momentum of its own.
    """

    _groups: dict[str, dict[str, Any]]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        config: DGCConfig,
        loss_scaling: bool = False,
    ) -> None:
        """Checks everything; see the class."""
        self.optimizer = unwrapped(optimizer)
        self.by_name = by_name(named_parameters)
        self._names = {id(p): name for name, p in self.by_name.items()}
        self.refresh()
        check_names(self.by_name, self.optimizer)
        self.never_compressed = dense_reasons(self.by_name, config)
        """Those dense in every phase, with the reason."""
        check_optimizer(self.optimizer, config, loss_scaling)
        self.device = next(iter(self.by_name.values())).device

    def refresh(self) -> None:
        """Looks again in which of the optimizer's groups each parameter is.

        Before each pass: load_state_dict() replaces the groups, and users take some out, or change their order.

        Raises:
            ValueError: a parameter is in none; or groups have got what check_optimizer refuses.
        """
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        if not_held := [name for name, p in self.by_name.items() if id(p) not in group_of]:
            raise ValueError(
                f"optimizer: expected it to hold every parameter, but not {', '.join(not_held)}: their gradients would "
                "be reduced and never applied. Pass them to the optimizer, in groups of one optimizer where they "
                "differ; or set requires_grad=False before DDP and DGCState are made. To freeze them later, keep their "
                "group in the optimizer, with lr = 0"
            )
        self._groups = {name: group_of[id(p)] for name, p in self.by_name.items()}
        check_momentum(self.optimizer)
        self.nesterov = any(group.get("nesterov", False) for group in self._groups.values())
        """Whether momentum is Nesterov's; the same in all groups."""

    def name(self, parameter: Tensor) -> str:
        """Returns a parameter's name.

        Raises:
            ValueError: named_parameters did not have it.
        """
        name = self.name_or_none(parameter)
        if name is None and not parameter.requires_grad:
            raise ValueError(
                f"DGCState: expected gradients of trainable parameters, got one of shape {tuple(parameter.shape)} that "
                "was frozen, requires_grad_(False), after DDP had wrapped the model: DDP goes on reducing it. Freeze "
                "it before DDP wraps the model, or leave it trainable, in a parameter group with lr = 0"
            )
        if name is None:
            raise ValueError(
                f"DGCState: expected the parameters of named_parameters, got a gradient for another one, of shape "
                f"{tuple(parameter.shape)}. Pass named_parameters() of the model that the hook is registered on"
            )
        return name

    def name_or_none(self, parameter: Tensor) -> str | None:
        """Returns a parameter's name; None where named_parameters did not have it, or it was frozen."""
        return self._names.get(id(parameter))

    def momentum(self, name: str) -> float:
        """Returns a parameter's momentum factor now; 0 where the optimizer knows none."""
        if not isinstance(self.optimizer, SGD):
            return 0.0
        return float(self._groups[name]["momentum"])

    @property
    def any_momentum(self) -> bool:
        """Whether any parameter has momentum now."""
        return any(map(self.momentum, self.by_name))

    @property
    def steps_alone_matter(self) -> bool:
        """Whether the optimizer keeps something between steps that a rank without step() would not have."""
        if isinstance(self.optimizer, SGD):
            return self.any_momentum
        return not isinstance(self.optimizer, torch.optim.SGD)

    @property
    def steps_taken(self) -> int:
        """How many steps the optimizer has taken, where it counts them; read from its state."""
        counts = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        return int(max(map(float, counts), default=0))

    def not_reduced(self, reduced: Collection[int]) -> list[str]:
        """Returns the names of parameters whose gradient the optimizer would apply, and nobody has exchanged.

        Args:
            reduced: ids of the parameters whose gradients came in this pass.
        """
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        local = [p for p in held if id(p) not in reduced]
        if all_zero(p.grad for p in local):
            return []
        return [self._names.get(id(p), f"one of shape {tuple(p.shape)}") for p in local]

    def without_gradient(self, reduced: Collection[int]) -> list[str]:
        """Returns the names of those that have no gradient, and did not come in this pass."""
        return [name for name, p in self.by_name.items() if p.grad is None and id(p) not in reduced]


def by_name(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the trainable parameters by name, without wrappers' prefixes.

    Raises:
        ValueError: a name or a parameter comes twice, a type is not supported, or there is none.
    """
    parameters: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, parameter in _unprefixed(_pairs(named_parameters)):
        if name in parameters or id(parameter) in seen:
            other = seen.get(id(parameter), name)
            raise ValueError(
                f"named_parameters: expected each parameter once, got {name!r} twice (also as {other!r}). "
                "Pass model.named_parameters(), which leaves duplicates out"
            )
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "device_mesh"):
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor, a shard of one (FSDP2, tensor parallel). DGC keeps "
                "momentum and residual of whole parameters: use DistributedDataParallel"
            )
        if parameter.is_meta or torch.nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"{name}: expected a parameter with memory, got one on the meta device, or of a lazy module. Make it "
                "real first: model.to_empty(device=...), or a forward pass"
            )
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


def _pairs(named_parameters: object) -> list[tuple[str, Tensor]]:
    """Returns the names and parameters that a user has passed.

    Raises:
        TypeError: it is something else, as people write it; the message says what to write.
    """
    write = "Pass model.named_parameters()"
    if isinstance(named_parameters, Mapping):
        raise TypeError(f"named_parameters: expected pairs, got a dict. {write}, or dict.items()")
    if isinstance(named_parameters, Tensor) or not isinstance(named_parameters, Iterable):
        raise TypeError(
            f"named_parameters: expected pairs of name and parameter, got {type(named_parameters).__name__}. {write}"
        )
    pairs = list(named_parameters)
    for pair in pairs:
        good = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not (good and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            what = "parameters without names" if isinstance(pair, Tensor) else f"{type(pair).__name__}"
            raise TypeError(f"named_parameters: expected pairs of name and parameter, got {what}. {write}")
    return pairs


def _unprefixed(pairs: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Returns the pairs with the names that the bare model has, so that a checkpoint fits whatever wraps it."""
    for wrapper in WRAPPERS:
        pairs = [(name.replace(wrapper, ""), p) for name, p in pairs]
    # DDP's prefix, which may also be the name of a submodule: only where all have it.
    while pairs and all(name.startswith("module.") for name, _ in pairs):
        pairs = [(name.removeprefix("module."), p) for name, p in pairs]
    return pairs


def unwrapped(optimizer: object) -> Optimizer:
    """Returns the optimizer inside of those that only pass its step() on: Accelerate's, Fabric's, Lookahead.

    Lightning's and Fabric's imitate the class of what they hold, so what they hold counts first.

    Raises:
        TypeError: it is none, and holds none.
    """
    attributes = getattr(optimizer, "__dict__", {})
    for attribute in ("_optimizer", "optimizer", "base_optimizer"):
        inner = attributes.get(attribute)
        if isinstance(inner, Optimizer) and inner is not optimizer:
            return unwrapped(inner)
    if isinstance(optimizer, Optimizer):
        return optimizer
    held = list(attributes.values())
    held += [one for several in held if isinstance(several, (list, tuple)) for one in several]
    inside = list({id(one): one for one in held if isinstance(one, Optimizer)}.values())
    if len(inside) == 1:
        return unwrapped(inside[0])
    got = f"{type(optimizer).__name__}" + (f", which holds {len(inside)} optimizers" if inside else "")
    raise TypeError(
        f"optimizer: expected dgc.SGD or another torch optimizer, got {got}. Write "
        "DGCState(model.named_parameters(), optimizer, config), with the optimizer that is inside of what wraps it: "
        "one DGCState serves one"
    )


def check_names(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Looks that named_parameters has all that the optimizer holds.

    Raises:
        ValueError: it has not.
    """
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
            f"{', '.join(unnamed)}. Pass model.named_parameters() of the whole model. A loss with weights of its own, "
            "or a second network, goes into the module that DDP wraps, or gets an optimizer of its own"
        )


def check_optimizer(optimizer: Optimizer, config: DGCConfig, loss_scaling: bool) -> None:
    """Refuses optimizers that would apply momentum a second time; warns of those outside the paper.

    Raises:
        ValueError: the message says why and what to use.
    """
    if isinstance(optimizer, SGD):
        return
    kind = type(optimizer).__name__
    if loss_scaling and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"optimizer: expected {kind}(fused=False) with a GradScaler, which calls step() of a fused one also where "
            "the step is to be left out"
        )
    if config.on_nonfinite == "skip":
        raise ValueError(f'on_nonfinite: expected "raise" with {kind}; only dgc.SGD can leave a step out')
    if not isinstance(optimizer, torch.optim.SGD):
        warnings.warn(
            f"dgc: {kind} is outside the paper: what it keeps of earlier gradients, or takes from their size, is "
            "misled by sparse, delayed ones. Accuracy may suffer; dgc.SGD is what DGC was made for",
            stacklevel=4,
        )


def check_momentum(optimizer: Optimizer) -> None:
    """Looks that DGC's is the only momentum, and one form of it.

    Raises:
        ValueError: it is not, from the start or since a schedule or load_state_dict() has changed the groups.
    """
    if isinstance(optimizer, SGD):
        check_groups(optimizer.param_groups)
    elif any(group.get("momentum", 0) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: expected dgc.SGD, got {type(optimizer).__name__} with momentum > 0. DGC applies momentum "
            "before it selects what to send; a second one would be applied to the sparse updates. Use dgc.SGD with the "
            "same arguments"
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
