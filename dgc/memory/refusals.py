"""Refusals: checks that a model and an optimizer belong together, and the reasons why parameters stay dense."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor
from torch.optim.optimizer import Optimizer

from dgc.config import DGCConfig


def unwrapped(optimizer: object) -> Optimizer:
    """Returns the optimizer inside of wrappers that forward its step(): Accelerate's, Fabric's, torchft's, Lookahead.

    Lightning's and Fabric's wrappers imitate the class of the optimizer inside, so the inside is looked at first. Other
    optimizers are looked into where what they hold has all of their parameters, as torchtitan's container does. One
    that holds an optimizer of some of them, as ZeRO does, is taken as it is.

    Raises:
        TypeError: the argument is no optimizer, and does not hold exactly one.
    """
    attributes = getattr(optimizer, "__dict__", {})
    for attribute in ("_optimizer", "optimizer", "base_optimizer"):
        inner = attributes.get(attribute)
        if isinstance(inner, Optimizer) and inner is not optimizer:
            return unwrapped(inner)
    held = list(attributes.values())
    held += [one for several in held if isinstance(several, (list, tuple)) for one in several]
    inside = list({id(one): one for one in held if isinstance(one, Optimizer)}.values())
    if isinstance(optimizer, Optimizer) and not (inside and _held_by(inside) == _held_by([optimizer])):
        return optimizer
    if len(inside) == 1:
        return unwrapped(inside[0])
    got = f"{type(optimizer).__name__}" + (f", which holds {len(inside)} optimizers" if inside else "")
    raise TypeError(
        f"optimizer: expected dgc.SGD, dgc.AdamW or another torch optimizer, got {got}. Write "
        "DGCState(model.named_parameters(), optimizer, config), with the optimizer that is inside of what wraps it: "
        "one DGCState serves one"
    )


def _held_by(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def check_names(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Checks that named_parameters has every trainable parameter of the optimizer.

    Raises:
        ValueError: one is missing.
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


def check_held(parameters: Mapping[str, Tensor], held: Collection[int]) -> None:
    """Checks that the optimizer holds every trainable parameter.

    Args:
        parameters: by name.
        held: ids of the optimizer's.

    Raises:
        ValueError: it does not hold one; or none of them, and then the remedy is another.
    """
    missing = [name for name, p in parameters.items() if id(p) not in held]
    if len(missing) == len(parameters):
        raise ValueError(
            f"optimizer: expected one of this model, got one that holds none of its parameters ({missing[0]}, ...). "
            "Make it from model.parameters() after what replaces them, as fully_shard does"
        )
    if missing:
        raise ValueError(
            f"optimizer: expected it to hold every parameter, but not {', '.join(missing)}: their gradients would be "
            "reduced and never applied. Pass them to the optimizer, in groups of one optimizer where they differ; or "
            "set requires_grad=False before DDP and DGCState are made. To freeze them later, keep their group in the "
            "optimizer, with lr = 0"
        )


def dense_reasons(parameters: Mapping[str, Tensor], config: DGCConfig) -> dict[str, str]:
    """Returns the parameters that are never compressed, with the reason.

    Raises:
        ValueError: config.dense_parameters names one that the model does not have.
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
