"""Names: the trainable parameters of a model by the names that the bare model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dgc.local import refusal_of

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Parts that torch.compile and torch's activation checkpointing put into names, anywhere."""


def by_name(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the trainable parameters by name, without wrappers' prefixes.

    Raises:
        ValueError: a name or a parameter comes twice; a type is not supported; a parameter has no memory; devices
            differ; or no parameter is trainable.
        TypeError: the argument is no pairs of name and tensor, or holds a DTensor that fully_shard has not sharded
            over one dimension.
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
        if refusal := refusal_of(parameter):
            raise TypeError(f"{name}: {refusal}")
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
    """Returns the user's pairs of name and parameter as a list.

    Raises:
        TypeError: the argument is something else; the message says what to write.
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
    # DDP's prefix may also be the name of a submodule, so it is removed only where all names have it.
    while pairs and all(name.startswith("module.") for name, _ in pairs):
        pairs = [(name.removeprefix("module."), p) for name, p in pairs]
    return pairs
